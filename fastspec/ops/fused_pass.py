"""One pass of the decode-time transformer in one launch, from token ids to logits."""

from __future__ import annotations

import threading
from functools import lru_cache

import torch

from fastspec.model.cache import StaticCache
from fastspec.model.transformer import DecodeTransformer
from fastspec.model.weights import LayerWeights
from fastspec.ops.backends import extension
from fastspec.ops.checks import check_tensor
from fastspec.ops.prefill import SILU
from fastspec.ops.verify import LOGIT_TYPES

#: As in csrc/params.h.
MAX_ROWS = 128
MAX_BATCH_SIZE = 8
MAX_VISIBLE = 17
MAX_SPLITS = 8
NEAR_PARTS = 4
MIN_SLOTS = 4
EXCHANGES = 3

PAIR_TILE = 16
#: Slots of the ring that a block has on their way from memory at a time. More do not come sooner, but make
#: everything else that passes through the L2 wait behind them.
SLOTS_UNDER_WAY = 6


class TooLargeError(ValueError):
    """A pass that the GPU's multiprocessors have too little shared memory for."""


class FusedPass:
    """A pass over R rows per sequence as one cooperative kernel, for GPUs of compute capability 9.0 and up.

    It computes what :meth:`DecodeTransformer.forward` and :meth:`DecodeTransformer.logits` compute, with the
    residual stream in float32. A row's logits have the same bits whatever the number of rows, the row's place,
    the tree around it or where its prefix ends, as long as the tokens before it are the same.

    Calling it launches one kernel: no allocation and no synchronisation, so a CUDA graph can capture it. The
    returned tensor is the same memory at every call. Calls must not overlap in time.

    Args:
        transformer: the model; its weights are read where they are.
        cache: the cache to read, and to write at the rows of the pass.
        num_rows: R.
        mask: ``[R, S]`` bool, which scratch rows each row sees; :class:`fastspec.model.cache.CacheView`.
            Ascending columns must be ascending positions, the last one the row's own.
        first_slot: scratch row of the pass's first row.

    Raises:
        ValueError: for what :func:`unsupported` names, and for a mask that does not fit.
        TooLargeError: if the residual stream does not fit into shared memory.

    Attributes:
        clock: ``[5 * layers + 3]`` int64 or None. If set, the kernel notes nanoseconds: at its start, when
            each step begins (qkv, attention, output, gate and up, down of every layer; then the head), and at
            the end.
    """

    def __init__(
        self,
        transformer: DecodeTransformer,
        cache: StaticCache,
        num_rows: int,
        mask: torch.Tensor,
        first_slot: int = 0,
    ):
        self._transformer, self._cache = transformer, cache  # keeps the memory alive
        self.device = transformer.device
        self.batch_size, self.num_rows, self.vocab_size = (
            cache.keys.shape[1],
            num_rows,
            transformer.vocab_size,
        )
        self.clock: torch.Tensor | None = None
        reason = unsupported(transformer, cache, num_rows)
        if reason is not None:
            raise ValueError(f"the fused pass does not support {reason}")
        visible = visible_slots(mask, num_rows, first_slot)
        num_slots = max(mask.shape[1], first_slot + num_rows)
        if num_slots > cache.capacity:
            raise ValueError(
                f"the cache has {cache.capacity} rows, but the pass needs {num_slots} after the prefix"
            )

        rows = self.batch_size * num_rows
        blocks = torch.cuda.get_device_properties(self.device).multi_processor_count
        heads, kv_heads, dim = transformer.num_heads, transformer.num_kv_heads, transformer.head_dim
        ffn_size = transformer.layers[0].down.shape[1]
        splits = min(MAX_SPLITS, max(1, blocks // kv_heads))
        tiles = self.batch_size * kv_heads * -(-num_rows * (heads // kv_heads) // PAIR_TILE)
        cached = (cache.keys.view(-1, dim), cache.values.view(-1, dim))

        def zeros(*shape, dtype=torch.float32):
            return torch.zeros(shape, dtype=dtype, device=self.device)

        self._module = extension()
        maps = _tensor_maps(self.device)
        self._layers = torch.tensor(
            [_pointers(layer, maps) for layer in transformer.layers], dtype=torch.int64, device=self.device
        )
        self._num_visible = torch.tensor([len(row) for row in visible], dtype=torch.int32, device=self.device)
        self._visible = torch.tensor(
            [row + [0] * (MAX_VISIBLE - len(row)) for row in visible], dtype=torch.uint8, device=self.device
        )
        self._rotation = _rotation(transformer, cache.capacity)
        # 16-byte messages about two elements of a part of a pair's attention each.
        self._parts = zeros(tiles, splits + NEAR_PARTS, PAIR_TILE, dim // 2, 4, dtype=torch.int32)
        self._counters = zeros(4, dtype=torch.int32)
        self._logits = zeros(rows, self.vocab_size)

        self._params = self._module.PassParams(
            self._layers.data_ptr(),
            transformer.embedding.data_ptr(),
            transformer.final_norm.data_ptr(),
            maps.address(transformer.lm_head),
            self._rotation.data_ptr(),
            cache.keys.data_ptr(),
            cache.values.data_ptr(),
            self._num_visible.data_ptr(),
            self._visible.data_ptr(),
            *(maps.address(rows, is_cache=True) for rows in cached),
            self._parts.data_ptr(),
            self._counters.data_ptr(),
            LOGIT_TYPES[transformer.dtype],
            self.batch_size,
            num_rows,
            first_slot,
            num_slots,
            max(map(len, visible)),
            transformer.num_layers,
            transformer.hidden_size,
            heads,
            kv_heads,
            dim,
            ffn_size,
            self.vocab_size,
            transformer.embedding.shape[0],
            cache.capacity,
            splits,
            _residual_tile(transformer.hidden_size, blocks),
            blocks,
            SLOTS_UNDER_WAY,
            transformer.epsilon,
            transformer.scale,
        )
        # All bits are set: that is how the kernel knows what has not been written.
        self._exchange = torch.full(
            (EXCHANGES, self._module.pass_exchange_bytes(self._params)),
            0xFF,
            dtype=torch.uint8,
            device=self.device,
        )
        self._params.set_exchange(self._exchange.data_ptr())
        with torch.cuda.device(self.device):
            slots = self._module.pass_slots(self._params)
        if slots < MIN_SLOTS:
            raise TooLargeError(
                f"the fused pass does not support hidden size {transformer.hidden_size} with {rows} rows: "
                "the residual stream does not fit into shared memory"
            )

    def __call__(
        self, token_ids: torch.Tensor, prefix: torch.Tensor, logit_row: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Runs the pass and writes the keys and values of its rows.

        Args:
            token_ids: ``[B, R]`` int64; ids outside the embedding (an absent token) count as id 0.
            prefix: ``[B]`` int64, committed rows of each sequence.
            logit_row: ``[B]`` int64, the only row of each sequence whose logits are wanted.

        Returns:
            Logits ``[B, R, V]`` float32, or ``[B, 1, V]`` with ``logit_row``; overwritten by the next call.

        Raises:
            ValueError: for tensors that do not fit together.
        """
        sizes = {"B": self.batch_size, "R": self.num_rows}
        check_tensor("token_ids", token_ids, "B R", sizes, (torch.int64,), self.device)
        check_tensor("prefix", prefix, "B", sizes, (torch.int64,), self.device)
        vectors = {"token_ids": token_ids, "prefix": prefix}
        if logit_row is not None:
            check_tensor("logit_row", logit_row, "B", sizes, (torch.int64,), self.device)
            vectors["logit_row"] = logit_row
        for name, tensor in vectors.items():
            if not tensor.is_contiguous():
                raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
        with torch.cuda.device(self.device):
            self._module.run_pass(
                self._params,
                token_ids.data_ptr(),
                prefix.data_ptr(),
                0 if logit_row is None else logit_row.data_ptr(),
                self._logits.data_ptr(),
                0 if self.clock is None else self.clock.data_ptr(),
                torch.cuda.current_stream(self.device).cuda_stream,
            )
        rows = self.num_rows if logit_row is None else 1
        return self._logits[: self.batch_size * rows].view(self.batch_size, rows, self.vocab_size)


def unsupported(transformer: DecodeTransformer, cache: StaticCache, num_rows: int) -> str | None:
    """What keeps a model from being run by :class:`FusedPass` with such a cache; None if nothing does."""
    if transformer.dtype not in (torch.bfloat16, torch.float16):
        return f"{str(transformer.dtype).removeprefix('torch.')} weights, only bfloat16 and float16"
    layers, shape = transformer.layers, tuple(cache.keys.shape)
    heads, kv_heads = transformer.num_heads, transformer.num_kv_heads
    batch_size, ffn_size = shape[1], layers[0].down.shape[1]
    if type(transformer.activation) is not SILU:
        return f"the activation {type(transformer.activation).__name__}, only SiLU"
    biases = {
        name
        for layer in layers
        for name in ("output_bias", "gate_up_bias", "down_bias")
        if getattr(layer, name) is not None
    }
    if biases or transformer.lm_head_bias is not None:
        names = ", ".join(sorted(biases)) or "the output projection"
        return f"a bias of {names}, only those of queries, keys and values"
    if transformer.head_dim not in (64, 128):
        return f"heads of {transformer.head_dim}, only of 64 and 128"
    if heads % kv_heads:
        return f"{heads} heads on {kv_heads} key-value heads"
    if transformer.hidden_size % 64 or ffn_size % 64:
        return f"hidden size {transformer.hidden_size} and intermediate size {ffn_size}, only multiples of 64"
    if shape[0] != len(layers) or shape[2] != kv_heads or shape[4] != transformer.head_dim:
        return f"a cache of shape {list(shape)} for this model"
    if cache.keys.dtype != transformer.dtype or not (
        cache.keys.is_contiguous() and cache.values.is_contiguous()
    ):
        return "a cache of another element type than the weights, or one that is not contiguous"
    if not 1 <= batch_size <= MAX_BATCH_SIZE:
        return f"{batch_size} sequences, only 1 to {MAX_BATCH_SIZE}"
    if not 1 <= num_rows * batch_size <= MAX_ROWS:
        return f"{batch_size} sequences of {num_rows} rows, only 1 to {MAX_ROWS} rows in all"
    weights = [transformer.embedding, transformer.final_norm, transformer.lm_head]
    weights += [tensor for layer in layers for tensor in layer if tensor is not None]
    if not all(tensor.is_contiguous() and tensor.data_ptr() % 16 == 0 for tensor in weights):
        return "weights that are not contiguous and aligned to 16 bytes"
    if transformer.device.type != "cuda":
        return f"weights on {transformer.device}, only on a GPU"
    if torch.cuda.get_device_capability(transformer.device)[0] < 9:
        return "GPUs before compute capability 9.0"
    try:
        extension()
    except ImportError as error:
        return f"an installation without CUDA kernels: {error}"
    return None


def visible_slots(mask: torch.Tensor, num_rows: int, first_slot: int) -> list[list[int]]:
    """The scratch rows that each row of a pass sees, in order.

    Raises:
        ValueError: for a mask of another shape, or rows that do not see themselves last, or see over 17.
    """
    if mask.ndim != 2 or mask.dtype != torch.bool or mask.shape[0] != num_rows:
        raise ValueError(f"mask must be [R={num_rows}, S] bool, got {list(mask.shape)} {mask.dtype}")
    visible = [row.nonzero()[:, 0].tolist() for row in mask.cpu()]
    for row, slots in enumerate(visible):
        if not 1 <= len(slots) <= MAX_VISIBLE:
            raise ValueError(f"row {row} must see 1 to {MAX_VISIBLE} scratch rows, got {len(slots)}")
        if slots[-1] != first_slot + row:
            raise ValueError(f"row {row} must see itself, slot {first_slot + row}, and none after it")
    return visible


def _pointers(layer: LayerWeights, maps: TensorMaps) -> list[int]:
    return [
        layer.input_norm.data_ptr(),
        maps.address(layer.qkv),
        0 if layer.qkv_bias is None else layer.qkv_bias.data_ptr(),
        maps.address(layer.output),
        layer.post_norm.data_ptr(),
        maps.address(layer.gate_up),
        maps.address(layer.down),
    ]


class TensorMaps:
    """Descriptions of matrices for bulk copies, on one device.

    Multiprocessors remember the maps that they have used and do not notice when one changes. So a place never
    holds another map than its first, and nothing is given back; a matrix takes 128 bytes.
    """

    PAGE = 256

    def __init__(self, device: torch.device):
        self._device = device
        self._lock = threading.Lock()
        self._addresses: dict[bytes, int] = {}
        self._pages: list[torch.Tensor] = []

    def address(self, matrix: torch.Tensor, is_cache: bool = False) -> int:
        """Where the map of a contiguous matrix of 16-bit elements lies on the device.

        Args:
            is_cache: whether the rows are keys or values, which are copied otherwise than weights.
        """
        with torch.cuda.device(self._device):
            encoded = extension().encode_matrix(matrix.data_ptr(), *matrix.shape, is_cache)
        with self._lock, torch.inference_mode(False):
            if encoded not in self._addresses:
                index = len(self._addresses) % self.PAGE
                if index == 0:
                    page = torch.zeros(self.PAGE, len(encoded), dtype=torch.uint8, device=self._device)
                    self._pages.append(page)
                place = self._pages[-1][index]
                place.copy_(torch.frombuffer(bytearray(encoded), dtype=torch.uint8))
                self._addresses[encoded] = place.data_ptr()
            return self._addresses[encoded]


@lru_cache
def _tensor_maps(device: torch.device) -> TensorMaps:
    return TensorMaps(device)


def _residual_tile(hidden_size: int, blocks: int) -> int:
    """Rows of a tile of the residual stream: the size whose tiles spread more evenly, 16 when in doubt."""

    def evenness(size):
        tiles = hidden_size // size
        return tiles / (-(-tiles // blocks) * blocks)

    return 8 if evenness(8) > 1.02 * evenness(16) else 16


def _rotation(transformer: DecodeTransformer, capacity: int) -> torch.Tensor:
    """``[capacity, head_dim / 2, 2]`` float32: cosine and sine of every position."""
    positions = torch.arange(capacity, device=transformer.device, dtype=torch.float32)
    angles = positions[:, None] * transformer.inverse_frequencies
    return (torch.stack((angles.cos(), angles.sin()), dim=-1) * transformer.rope_scaling).contiguous()
