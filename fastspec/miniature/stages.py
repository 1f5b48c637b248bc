"""The stages of training: tokenizer, target, the drafts, scores. Each reads and writes one folder."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoProcessor, LlamaForCausalLM, LlavaForConditionalGeneration
from transformers.utils import logging

from fastspec.training.adapter import add_image_adapter

from . import DRAFTS
from .card import write_card
from .fitting import Batch, Budget, Feed, ImageDraftLoss, PatchHeads, TargetLoss, draft_loss, fit
from .language import TASKS, Example
from .models import count_parameters, new_draft, new_processor, new_target, replace_folder, save_model
from .scenes import Scene
from .scoring import answer_ids, foresight, held_out, score_captions, score_target
from .stream import TEXT_LENGTH, Source, drop_image
from .tokens import PAD, corpus, prompt_text, train_tokenizer

CORPUS = 30_000  # examples the tokenizer is trained on
QUESTIONS = 6  # to the target about one picture, when its answers are collected
EPOCHS = 12  # over the target's answers
TOWER_SHARE = 0.15  # of the target's time, for its vision tower alone
RATES = {"target": 1e-3, "base": 3e-3, "chat": 3e-3, "ft": 2e-3, "image": 2e-3}
IMAGE_POOLING = 2  # the image draft sees 36 image tokens
#: When the answers, the adapter alone and the image draft are ready, as shares of the stage's time; the twin follows.
IMAGE_ENDS = (0.6, 0.7, 0.92)


@dataclass(frozen=True)
class Run:
    """One run of the training command."""

    out: Path
    device: torch.device
    seed: int
    batch: int
    draft_batch: int
    workers: int
    steps: int | None
    rate: float | None
    scenes: int
    answer_tokens: int
    compile: bool
    resume: bool = False

    def source(self, kind: str, rows: int) -> Source:
        return Source(self.out / "target", kind, self.seed, rows if not self.workers else 64, self.workers)

    def processor(self):
        return AutoProcessor.from_pretrained(self.out / "target")

    def load(self, name: str):
        cls = LlavaForConditionalGeneration if name == "target" else LlamaForCausalLM
        return cls.from_pretrained(self.out / name, dtype=torch.float32).to(self.device)

    def log(self) -> dict:
        """What training.json tells of the stages so far."""
        path = self.out / "training.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def record(self, stage: str, **facts: object) -> None:
        """Keep what a stage did in training.json, and renew the model card."""
        path = self.out / "training.json"
        log = self.log() | {stage: facts}
        path.write_text(json.dumps(log, indent=1) + "\n")
        write_card(self.out, log)

    def device_name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"CPU, {torch.get_num_threads()} threads"


@contextmanager
def _feed(run: Run, kind: str, batch: int):
    source = run.source(kind, batch)
    try:
        yield Feed(source, batch, run.device, run.seed)
    finally:
        source.close()


def tokenizer(run: Run, deadline: float | None) -> None:
    begin = time.monotonic()
    count = CORPUS if run.steps is None else 3000
    bpe = train_tokenizer(tqdm(corpus(run.seed, count), desc="tokenizer", unit=" texts"))
    processor = new_processor(bpe)
    replace_folder(run.out / "target", processor.save_pretrained)
    run.record("tokenizer", seconds=time.monotonic() - begin, vocabulary=bpe.get_vocab_size(), examples=count)


def target(run: Run, deadline: float | None) -> None:
    begin = time.monotonic()
    torch.manual_seed(run.seed)
    processor = run.processor()
    model = run.load("target") if run.resume else new_target().to(run.device)
    heads = PatchHeads(model.config.vision_config.hidden_size).to(run.device)
    examples = held_out("caption", 64 if run.steps is None else 4, start=900_000)

    def named() -> str:
        batch = feed.next()
        shares = heads.shares(loss.features(batch), batch.labels)
        return "patches named rightly: " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items())

    def probe() -> str:
        model.eval()
        score = score_captions(model, processor, examples, 64, max_new_tokens=run.answer_tokens)
        model.train()
        parts = " ".join(
            f"{name} {right / max(1, total):.0%}"
            for name, (right, total) in score.parts.items()
            if not name.startswith("with")
        )
        return f"captions right {score.share:.0%} ({parts})"

    loss = TargetLoss(model, heads, processor, **({"guidance": 0.0} if run.resume else {}))
    if run.compile:
        model.model.language_model.compile()
        model.model.vision_tower.compile()
    rate = run.rate or RATES["target"]
    model.train()
    before = run.log().get("target", {}) if run.resume else {}
    tower_steps = before.get("tower_steps", 0)
    with _feed(run, "picture", run.batch) as feed:
        if not run.resume:
            half = Budget(run.steps, None if deadline is None else begin + TOWER_SHARE * (deadline - begin))
            tower_steps = fit(
                "tower", (model.model.vision_tower, heads), loss.tower, feed.next, half, rate, named, 3
            )
        steps = fit(
            "target",
            (model, heads),
            loss,
            feed.next,
            Budget(run.steps, deadline),
            rate,
            None if run.compile else probe,  # the probe's shapes would be compiled one by one
            probes=4,
        )
        passes = feed.passes
    model.eval()
    save_model(model, processor, run.out / "target")
    run.record(
        "target",
        seconds=time.monotonic() - begin + before.get("seconds", 0.0),
        device=_then(before.get("device"), run.device_name()),
        steps=_then(before.get("steps"), steps),
        tower_steps=tower_steps,
        batch=_then(before.get("batch"), run.batch),
        passes=passes,
        parameters=count_parameters(model),
        resumed=before.get("resumed", 0) + run.resume,
    )


def _then(before: object, now: object) -> object:
    """A fact of a resumed stage: that of the run before, then that of this one."""
    return now if before is None else f"{before}, then {now}"


def _fit_draft(run: Run, name: str, model, next_batch, budget: Budget, **facts: object) -> None:
    begin = facts.pop("begin", time.monotonic())
    model.train()
    steps = fit(f"draft-{name}", (model,), draft_loss(model), next_batch, budget, run.rate or RATES[name])
    model.eval()
    save_model(model, run.processor().tokenizer, run.out / f"draft-{name}")
    run.record(
        name,
        seconds=time.monotonic() - begin,
        device=run.device_name(),
        steps=steps,
        batch=run.draft_batch,
        parameters=count_parameters(model),
        **facts,
    )


def base(run: Run, deadline: float | None) -> None:
    """From nothing, on the plain texts."""
    torch.manual_seed(run.seed + 1)
    with _feed(run, "plain", run.draft_batch) as feed:
        _fit_draft(run, "base", new_draft().to(run.device), feed.next, Budget(run.steps, deadline))


def chat(run: Run, deadline: float | None) -> None:
    """From the base draft, on the dialogues without their pictures."""
    with _feed(run, "chat", run.draft_batch) as feed:
        _fit_draft(run, "chat", run.load("draft-base"), feed.next, Budget(run.steps, deadline))


@dataclass
class _Answers:
    """What the target said: (prompt ids, answer ids, number of the picture), and the pictures."""

    rows: list[tuple[list[int], list[int], int]]
    pictures: list

    def text_rows(self, run: Run) -> tuple[Tensor, Tensor]:
        """Ids without image tokens and which of them are to be learned, ``[n, length]`` on the device."""
        ids = torch.full((len(self.rows), TEXT_LENGTH + 64), PAD, dtype=torch.int16)
        spoken = torch.zeros(ids.shape, dtype=torch.bool)
        for index, (prompt, answer, _) in enumerate(self.rows):
            prompt = drop_image(prompt)
            row = torch.tensor((prompt + answer)[: ids.shape[1]], dtype=torch.int16)
            ids[index, : len(row)] = row
            spoken[index, len(prompt) : len(row)] = True
        longest = int((ids != PAD).any(0).nonzero().max()) + 1
        return ids[:, :longest].to(run.device), spoken[:, :longest].to(run.device)


def _collect(run: Run, model, processor, enough: float | None) -> _Answers:
    """The target's own answers to pictures, half of them greedy and half sampled, until the clock says enough."""
    rng = Random(f"training {run.seed} answers")
    found = _Answers([], [])
    per_round = 2048 if run.device.type == "cuda" else 32
    torch.manual_seed(run.seed + 2)
    bar = tqdm(desc="the target's answers", unit=" answers")
    while not found.rows or (len(found.rows) < 64 if run.steps is not None else time.monotonic() < enough):
        places, texts = [], []
        for index in range(per_round):
            if index % QUESTIONS == 0:
                scene = Scene.random(rng)
                found.pictures.append(scene.render())
            example = Example.random(TASKS[index % len(TASKS)], rng, scene)
            places.append(len(found.pictures) - 1)
            texts.append(prompt_text(example.turns, int(rng.random() * len(example.turns))))
        sampled = len(found.rows) // per_round % 2 == 1
        options = {"do_sample": True, "temperature": 1.0, "top_k": 0} if sampled else {}
        images = [found.pictures[place] for place in places]
        pairs = answer_ids(
            model, processor, images, texts, per_round, max_new_tokens=run.answer_tokens, **options
        )
        found.rows += [(*pair, place) for pair, place in zip(pairs, places, strict=True)]
        bar.update(per_round)
    bar.close()
    return found


def ft(run: Run, deadline: float | None) -> None:
    """From the chat draft, on the target's own answers to pictures, half of them greedy and half sampled."""
    begin = time.monotonic()
    # Most of the time goes into the answers: the draft itself is soon through with them.
    enough = None if deadline is None else begin + 0.75 * (deadline - begin)
    answers = _collect(run, run.load("target").eval(), run.processor(), enough)
    ids, spoken = answers.text_rows(run)

    def next_batch() -> Batch:
        some = torch.randint(len(ids), (run.draft_batch,), device=run.device)
        return Batch(ids[some].long(), spoken[some], None, None)

    budget = Budget(run.steps or max(1, EPOCHS * len(ids) // run.draft_batch), deadline)
    _fit_draft(run, "ft", run.load("draft-chat"), next_batch, budget, begin=begin, answers=len(ids))


def image(run: Run, deadline: float | None) -> None:
    """From the ft draft, with an adapter to the target's vision features: the adapter alone, then all but the tower.

    A twin, the ft draft without an adapter, learns as long from the same answers: what it gains is not the image's.
    """
    begin = time.monotonic()
    target, processor = run.load("target").eval(), run.processor()
    enough, alone, together = (
        None if deadline is None else begin + share * (deadline - begin) for share in IMAGE_ENDS
    )
    answers = _collect(run, target, processor, enough)
    text_ids, text_spoken = answers.text_rows(run)
    pictures = torch.tensor([place for _, _, place in answers.rows], device=run.device)
    features = torch.cat([_features(target, processor, some) for some in _chunks(answers.pictures, 128)])

    torch.manual_seed(run.seed + 3)
    draft = add_image_adapter(run.load("draft-ft").cpu(), target.cpu(), pooling=IMAGE_POOLING).to(run.device)
    loss = ImageDraftLoss(draft, processor)
    ids, spoken = loss.with_image(text_ids, text_spoken)

    def next_with_image() -> Batch:
        some = torch.randint(len(ids), (run.draft_batch,), device=run.device)
        return Batch(ids[some].long(), spoken[some], features[pictures[some]].float(), None)

    def next_text() -> Batch:
        some = torch.randint(len(ids), (run.draft_batch,), device=run.device)
        return Batch(text_ids[some].long(), text_spoken[some], None, None)

    steps = run.steps or max(1, EPOCHS * len(ids) // run.draft_batch)
    rate = run.rate or RATES["image"]
    adapter = draft.model.multi_modal_projector
    adapter_steps = fit("adapter", (adapter,), loss, next_with_image, Budget(steps, alone), rate)
    learning = (draft.model.language_model, adapter)
    steps = fit("draft-image", learning, loss, next_with_image, Budget(steps, together), rate)
    save_model(draft.eval(), processor, run.out / "draft-image")
    twin = run.load("draft-ft")
    twin_steps = fit("draft-twin", (twin,), draft_loss(twin), next_text, Budget(steps, deadline), rate)
    save_model(twin.eval(), run.processor().tokenizer, run.out / "draft-twin")
    run.record(
        "image",
        seconds=time.monotonic() - begin,
        device=run.device_name(),
        steps=steps,
        adapter_steps=adapter_steps,
        twin_steps=twin_steps,
        batch=run.draft_batch,
        parameters=count_parameters(draft),
        answers=len(ids),
    )


def _chunks(items: list, size: int) -> list[list]:
    return [items[start : start + size] for start in range(0, len(items), size)]


@torch.no_grad()
def _features(target, processor, pictures: list) -> Tensor:
    """What the target's tower says of each patch, ``[n, 144, 192]`` in half precision."""
    pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    return target.model.vision_tower(pixels.to(target.device)).last_hidden_state[:, 1:].half()


def score(run: Run, deadline: float | None) -> None:
    begin = time.monotonic()
    processor, model = run.processor(), run.load("target").eval()
    batch = 512 if run.device.type == "cuda" else 32
    scores = score_target(model, processor, run.scenes, batch, max_new_tokens=run.answer_tokens)
    drafts = {
        name: run.load(f"draft-{name}").eval()
        for name in DRAFTS
        if (run.out / f"draft-{name}" / "config.json").exists()
    }
    ahead = foresight(
        model, drafts, processor, max(6, run.scenes // 2), min(batch, 64), max_new_tokens=run.answer_tokens
    )
    for task, one in scores.items():
        tqdm.write(f"{task}: {one}")
    for name, one in ahead.items():
        tqdm.write(f"draft-{name}: {one}")
    run.record(
        "score",
        seconds=time.monotonic() - begin,
        device=run.device_name(),
        scenes=run.scenes,
        tasks={task: one.record() for task, one in scores.items()},
        drafts={name: asdict(one) for name, one in ahead.items()},
    )


@dataclass(frozen=True)
class Stage:
    run: Callable[[Run, float | None], None]
    share: float  # of the time of a whole run
    needs: dict[str, str]  # file to the stage that makes it


VOCABULARY = {"target/tokenizer.json": "tokenizer"}
TARGET = {"target/model.safetensors": "target"}
STAGES = {
    "tokenizer": Stage(tokenizer, 0.03, {}),
    "target": Stage(target, 0.70, VOCABULARY),
    "base": Stage(base, 0.06, VOCABULARY),
    "chat": Stage(chat, 0.07, {"draft-base/model.safetensors": "base"}),
    "ft": Stage(ft, 0.10, TARGET | {"draft-chat/model.safetensors": "chat"}),
    "image": Stage(image, 0.25, TARGET | {"draft-ft/model.safetensors": "ft"}),
    "score": Stage(score, 0.04, TARGET),
}


def run_stages(run: Run, names: list[str], minutes: float | None, begin: float) -> None:
    """Run these stages one after the other. Their ends are spread over the minutes, counted from `begin`."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if run.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    whole, used = sum(STAGES[name].share for name in names), 0.0
    for name in names:
        for file, maker in STAGES[name].needs.items():
            if not (run.out / file).exists():
                raise SystemExit(f"stage {name} needs {run.out / file}, which stage {maker} makes")
        used += STAGES[name].share
        deadline = None if minutes is None else begin + 60 * minutes * used / whole
        STAGES[name].run(run, deadline)
