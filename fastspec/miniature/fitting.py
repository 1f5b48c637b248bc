"""The training loop: batches from a ring of rows on the device, and a schedule that ends on time."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastspec.draft.pooling import image_pooling

from .scenes import SIDE
from .stream import ATTRIBUTES, Source, row_length
from .tokens import IMAGE, IMAGE_TOKENS

RING_ROWS = 32768  # 0.9 GB of pictures
BAR = "{desc} {percentage:3.0f}%|{bar:30}| {elapsed}<{remaining} {postfix}"
WARM_UP, FLOOR = 0.04, 0.01  # share of the run with a rising rate; last rate over peak rate


@dataclass(frozen=True)
class Batch:
    ids: Tensor
    spoken: Tensor
    images: Tensor | None
    labels: Tensor | None


class Feed:
    """Random batches of the newest rows. It never waits for a full batch of new ones: when the trainer is
    faster than the workers, rows are seen again, and `passes` says how often on average."""

    def __init__(self, source: Source, batch: int, device: torch.device, seed: int):
        self._source, self._batch, self._inline = source, batch, not source.parallel
        capacity = batch if self._inline else max(RING_ROWS, 2 * batch)
        picture = source.kind == "picture"

        def room(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(capacity, *shape, dtype=dtype, device=device)

        length = row_length(source.kind)
        self._rings = [room(length, dtype=torch.int16), room(length, dtype=torch.bool)]
        if picture:
            self._rings.append(room(SIDE, SIDE, 3, dtype=torch.uint8))
            self._rings.append(room(IMAGE_TOKENS, len(ATTRIBUTES), dtype=torch.int8))
        self._capacity, self._written, self._read = capacity, 0, 0
        self._generator = torch.Generator(device).manual_seed(seed)

    def _store(self, chunk) -> None:
        arrays = [chunk.ids, chunk.spoken]
        if chunk.images is not None:
            arrays += [chunk.images, chunk.labels]
        rows = len(chunk.ids)
        at = self._written % self._capacity
        head = min(rows, self._capacity - at)
        for ring, array in zip(self._rings, arrays, strict=True):
            new = torch.from_numpy(array).to(ring.device)
            ring[at : at + head] = new[:head]
            ring[: rows - head] = new[head:]
        self._written += rows

    def next(self) -> Batch:
        if self._inline:
            self._store(self._source.take(wait=True))
        else:
            while self._written < 2 * self._batch:
                self._store(self._source.take(wait=True))
            for _ in range(8):
                chunk = self._source.take(wait=False)
                if chunk is None:
                    break
                self._store(chunk)
        filled = min(self._written, self._capacity)
        self._read += self._batch
        if self._inline:
            parts = self._rings
        else:
            ring = self._rings[0]
            rows = torch.randint(filled, (self._batch,), generator=self._generator, device=ring.device)
            parts = [ring[rows] for ring in self._rings]
        ids, spoken, images, labels = (*parts, None, None)[:4]
        return Batch(ids.long(), spoken, images, labels)

    @property
    def passes(self) -> float:
        return self._read / max(1, self._written)


@dataclass
class Budget:
    """How long a loop may run: `steps`, or until `deadline` (of `time.monotonic`)."""

    steps: int | None = None
    deadline: float | None = None

    def start(self) -> None:
        self._begin = time.monotonic()

    def progress(self, step: int) -> float:
        """0 to 1; 1 or more when the budget is spent."""
        done = 0.0
        if self.steps is not None:
            done = step / self.steps
        if self.deadline is not None:
            now = time.monotonic()
            done = max(done, (now - self._begin) / max(1e-9, self.deadline - self._begin))
        return done


def rate_at(progress: float) -> float:
    """Share of the peak learning rate: a linear rise, then a cosine down."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return min(1.0, progress / WARM_UP + 1e-3) * (FLOOR + (1 - FLOOR) * cosine)


def fit(
    name: str,
    modules: Iterable[nn.Module],
    loss_of: Callable[[Batch, float], Tensor],
    next_batch: Callable[[], Batch],
    budget: Budget,
    rate: float,
    probe: Callable[[], str] | None = None,
    probes: int = 8,
) -> int:
    """Minimise the loss over the batches until the budget is spent; returns the number of steps.

    `loss_of` gets the batch and the progress (0 to 1). `probe` is asked `probes` times for a line to show.
    """
    parameters = [parameter for module in modules for parameter in module.parameters()]
    device = parameters[0].device
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.97), fused=device.type == "cuda")
    step, mean, shown, note = 0, 0.0, 0.0, ""
    budget.start()
    often = 0.1 if sys.stderr.isatty() else 10.0
    bar = tqdm(total=1000, desc=name, bar_format=BAR, mininterval=often)
    while (progress := budget.progress(step)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate * rate_at(progress)
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_of(next_batch(), progress)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        if step % 20 == 0 or step == 1:
            mean = loss.item() if step == 1 else 0.5 * mean + 0.5 * loss.item()
            if not math.isfinite(mean):
                raise FloatingPointError(f"{name}: the loss is {mean} after {step} steps; try a lower --rate")
            bar.set_postfix_str(f"step {step} loss {mean:.3f} {note}", refresh=False)
        if probe and progress - shown >= 1 / probes:
            shown, note = progress, probe()
            tqdm.write(f"{name} {progress:4.0%}  step {step}  loss {mean:.3f}  {note}")
        bar.update(int(1000 * min(1.0, budget.progress(step))) - bar.n)
    bar.close()
    return step


def normalised(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 [B, 96, 96, 3] to what the image processor makes of the pictures, float [B, 3, 96, 96]."""
    return ((images.permute(0, 3, 1, 2).float() / 255 - mean) / std).contiguous()


class PatchHeads(nn.Module):
    """What covers each patch, read off the tower's features. LLaVA starts from a tower that CLIP has trained;
    naming patches stands in for that, and the heads are thrown away afterwards."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.covered = nn.Linear(width, 1)
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(all)) for name, all in ATTRIBUTES.items()})

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """features [B, 144, width], labels int8 [B, 144, 5]; patches that show nothing count only as such."""
        features = self.norm(features)
        shown = self.covered(features).squeeze(-1).float()
        total = nn.functional.binary_cross_entropy_with_logits(shown, (labels[..., 0] >= 0).float())
        for index, head in enumerate(self.heads.values()):
            wanted = labels[..., index].long().flatten()
            total = total + nn.functional.cross_entropy(
                head(features).float().flatten(0, 1), wanted, ignore_index=-1
            )
        return total

    @torch.inference_mode()
    def shares(self, features: Tensor, labels: Tensor) -> dict[str, float]:
        """Per attribute, how many of the covered patches are named rightly."""
        shown = labels[..., 0] >= 0
        features, wanted = self.norm(features)[shown], labels[shown]
        return {
            name: (head(features).argmax(-1) == wanted[:, index]).float().mean().item()
            for index, (name, head) in enumerate(self.heads.items())
        }


def spoken_loss(head: nn.Module, hidden: Tensor, batch: Batch, start: int = 1) -> Tensor:
    """Cross-entropy of the tokens from `start` on that the assistant says. Masked, not picked: a pick would make
    the GPU wait."""
    wanted = batch.ids[:, start:].masked_fill(~batch.spoken[:, start:], -100)
    return nn.functional.cross_entropy(
        head(hidden[:, start - 1 : -1]).float().flatten(0, 1), wanted.flatten()
    )


class TargetLoss:
    """The target's loss. It embeds pictures and text as `LlavaModel.forward` does, without its checks,
    each of which would make the GPU wait."""

    def __init__(self, model, heads: PatchHeads, processor, guidance: float = 0.3):
        device = next(model.parameters()).device
        image_processor = processor.image_processor
        self._mean = torch.tensor(image_processor.image_mean, device=device).view(3, 1, 1)
        self._std = torch.tensor(image_processor.image_std, device=device).view(3, 1, 1)
        self._model, self._heads, self._guidance = model, heads, guidance
        prompt = processor.tokenizer("USER: <image>")["input_ids"]
        self._at = prompt.index(IMAGE)

    def features(self, batch: Batch) -> Tensor:
        """What the tower says of each patch, [B, 144, 192]."""
        pixels = normalised(batch.images, self._mean, self._std)
        return self._model.model.vision_tower(pixels).last_hidden_state[:, 1:]

    def hidden(self, batch: Batch, features: Tensor) -> Tensor:
        model = self._model.model
        text = model.language_model.embed_tokens(batch.ids)
        before, after = text[:, : self._at], text[:, self._at + IMAGE_TOKENS :]
        embeddings = torch.cat([before, model.multi_modal_projector(features).to(text.dtype), after], dim=1)
        return model.language_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state

    def tower(self, batch: Batch, progress: float) -> Tensor:
        """The loss of the first phase: the tower names what covers each patch."""
        return self._heads.loss(self.features(batch), batch.labels)

    def __call__(self, batch: Batch, progress: float) -> Tensor:
        """The loss of the second phase: the tower's, fading out, and the assistant's words."""
        features = self.features(batch)
        hidden = self.hidden(batch, features)
        loss = spoken_loss(self._model.lm_head, hidden, batch, start=self._at + IMAGE_TOKENS)
        share = self._guidance * max(0.0, 1 - 3 * progress)
        return loss + share * self._heads.loss(features, batch.labels) if share else loss


def draft_loss(model) -> Callable[[Batch, float], Tensor]:
    def loss(batch: Batch, progress: float) -> Tensor:
        return spoken_loss(
            model.lm_head, model.model(input_ids=batch.ids, use_cache=False).last_hidden_state, batch
        )

    return loss


class ImageDraftLoss:
    """The loss of an image draft whose vision features were computed beforehand; all rows have their image in one
    place.

    Args:
        model: the draft.
        processor: the target's.
    """

    def __init__(self, model, processor):
        self._model = model
        self._at = processor.tokenizer("USER: <image>")["input_ids"].index(IMAGE)
        self._places = IMAGE_TOKENS // image_pooling(model) ** 2

    def with_image(self, ids: Tensor, spoken: Tensor) -> tuple[Tensor, Tensor]:
        """Rows without image tokens ``[n, length]`` with the draft's put in."""
        shape = (len(ids), self._places)
        images = torch.full(shape, IMAGE, dtype=ids.dtype, device=ids.device)
        silence = torch.zeros(shape, dtype=torch.bool, device=ids.device)
        return (
            torch.cat([ids[:, : self._at], images, ids[:, self._at :]], 1),
            torch.cat([spoken[:, : self._at], silence, spoken[:, self._at :]], 1),
        )

    def __call__(self, batch: Batch, progress: float) -> Tensor:
        """The assistant's words; ``batch.images`` holds the tower's features."""
        model, end = self._model.model, self._at + self._places
        text = model.language_model.embed_tokens(batch.ids)
        image = model.multi_modal_projector(batch.images).to(text.dtype)
        embeddings = torch.cat([text[:, : self._at], image, text[:, end:]], 1)
        hidden = model.language_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        return spoken_loss(self._model.lm_head, hidden, batch, start=end)
