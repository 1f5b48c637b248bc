"""The command line: demo, generate, evaluate, distill-data, train-draft, shrink-draft, info."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand

app = typer.Typer(
    help="Speculative decoding for LLaVA-style multimodal models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class ManyValues(TyperCommand):
    """A command whose repeatable options also take several values after one name: ``--gamma 3 5``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        repeatable = {
            name for option in self.params if getattr(option, "multiple", False) for name in option.opts
        }
        spread: list[str] = []
        option = None
        for place, argument in enumerate(args):
            if argument.startswith("--"):
                option = argument if argument in repeatable else None
            elif option is not None and args[place - 1] != option:
                spread.append(option)
            spread.append(argument)
        return super().parse_args(ctx, spread)


Device = Annotated[str | None, typer.Option(help="torch device; a GPU if there is one")]
Gamma = Annotated[int, typer.Option(min=1, help="drafted tokens per cycle")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="most tokens to generate")]
Seed = Annotated[int, typer.Option(help="seed of the random numbers")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 is greedy decoding")]


@app.command()
def demo(
    image: Annotated[Path | None, typer.Option(help="a picture of yours instead of a drawn one")] = None,
    prompt: Annotated[str | None, typer.Option(help="what to ask about it")] = None,
    gamma: Gamma = 5,
    temperature: Temperature = 0.0,
    max_new_tokens: MaxNewTokens = 160,
    seed: Seed = 36,
    device: Device = None,
    save: Annotated[Path, typer.Option(help="where the drawn picture goes")] = Path("fastspec-demo.png"),
) -> None:
    """Lets the built-in miniature LLaVA describe a picture, drafted and accepted tokens told apart."""
    from fastspec.demo import run_demo

    identical = run_demo(
        image,
        prompt,
        gamma=gamma,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        seed=seed,
        device=_device(device),
        save=save,
        console=Console(highlight=False),
    )
    if temperature == 0 and not identical:
        raise typer.Exit(1)


@app.command()
def generate(
    target: Annotated[str, typer.Option(help="a LLaVA checkpoint: directory, hub name, or 'miniature'")],
    prompt: Annotated[str, typer.Option(help="what to ask; images come before it")],
    draft: Annotated[str, typer.Option(help="a draft checkpoint, 'ngram', or 'miniature'")] = "ngram",
    image: Annotated[list[Path] | None, typer.Option(help="an image file; repeat for several")] = None,
    gamma: Gamma = 5,
    rule: Annotated[str | None, typer.Option(help="acceptance rule; the default fits the draft")] = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="0 keeps all")] = 0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="1 keeps all")] = 1.0,
    min_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="0 keeps all")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="1 is none")] = 1.0,
    seed: Seed = 0,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    device: Device = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="print one JSON object instead of streaming")
    ] = False,
) -> None:
    """Answers a prompt about images with any LLaVA checkpoint on disk or in the local hub cache."""
    from fastspec.command import Question, answer

    question = Question(
        target=target,
        draft=draft,
        prompt=prompt,
        images=tuple(image or ()),
        gamma=gamma,
        rule=rule,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        dtype=dtype,
        device=_device(device),
    )
    result = answer(question, stream=not as_json)
    if as_json:
        typer.echo(json.dumps(result, ensure_ascii=False))
        return
    efficiency = result["speculation"]["block_efficiency"]
    passes = f", {efficiency:.2f} per target pass" if efficiency else ""
    typer.echo(f"{len(result['tokens'])} tokens in {result['seconds']:.2f} s{passes}", err=True)


@app.command(cls=ManyValues)
def evaluate(
    target: Annotated[str, typer.Option(help="a LLaVA checkpoint: directory, hub name, or 'miniature'")],
    draft: Annotated[
        list[str],
        typer.Option(help="a draft checkpoint, 'ngram', 'miniature' or 'miniature:base'; repeat for several"),
    ],
    task: Annotated[
        list[str], typer.Option(help="a JSONL file of prompts, or 'miniature:caption'; repeat for several")
    ],
    gamma: Annotated[
        list[int] | None, typer.Option(min=1, help="drafted tokens per cycle; 5 without --tree; repeatable")
    ] = None,
    tree: Annotated[
        list[str] | None, typer.Option(help="branching factors of a tree, such as 3,2,1; repeatable")
    ] = None,
    rule: Annotated[
        list[str] | None, typer.Option(help="acceptance rule; the default fits draft and shape; repeatable")
    ] = None,
    temperature: Annotated[
        list[float] | None, typer.Option(min=0.0, help="0, the default, is greedy decoding; repeatable")
    ] = None,
    top_k: Annotated[int, typer.Option(min=0, help="0 keeps all")] = 0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="1 keeps all")] = 1.0,
    max_new_tokens: MaxNewTokens = 128,
    limit: Annotated[int | None, typer.Option(min=1, help="only the first prompts of each task")] = None,
    image_folder: Annotated[
        Path | None, typer.Option(help="where relative image paths start, if not at the task file")
    ] = None,
    seed: Seed = 0,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    device: Device = None,
    out: Annotated[
        Path, typer.Option(help="folder of the results; an interrupted run continues there")
    ] = Path("fastspec-evaluation"),
    skip_bad_lines: Annotated[
        bool, typer.Option(help="count task lines that cannot be asked and go on")
    ] = False,
) -> None:
    """Measures drafts on tasks: block efficiency, acceptance, speed beside plain decoding."""
    from fastspec import evaluation
    from fastspec.report import report

    asked = evaluation.Evaluation(
        target=target,
        drafts=tuple(draft),
        tasks=tuple(task),
        gammas=tuple(gamma or ()),
        trees=tuple(tree or ()),
        rules=tuple(rule or ()),
        temperatures=tuple(temperature or (0.0,)),
        top_k=top_k,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        limit=limit,
        image_folder=image_folder,
        seed=seed,
        dtype=dtype,
        device=_device(device),
        out=out,
        skip_bad_lines=skip_bad_lines,
    )
    results = evaluation.evaluate(asked, Console(stderr=True, highlight=False))
    report(results, out, Console(highlight=False))


@app.command("distill-data")
def distill_data(
    target: Annotated[str, typer.Option(help="a LLaVA checkpoint: directory, hub name, or 'miniature'")],
    images: Annotated[Path, typer.Option(help="the folder of images")],
    prompts: Annotated[
        Path, typer.Option(help="a text file, each line asked about each image; or LLaVA chats (.jsonl)")
    ],
    out: Annotated[Path, typer.Option(help="the JSONL file of answers; continued if it is there")],
    draft: Annotated[str, typer.Option(help="a draft checkpoint, 'ngram', or 'miniature'")] = "ngram",
    temperature: Annotated[
        list[float] | None, typer.Option(min=0.0, help="repeat for several; 0, greedy decoding, unless given")
    ] = None,
    gamma: Gamma = 5,
    max_new_tokens: MaxNewTokens = 256,
    batch_size: Annotated[int, typer.Option(min=1, max=8, help="prompts answered together")] = 1,
    seed: Seed = 0,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    device: Device = None,
    skip_bad_lines: Annotated[bool, typer.Option(help="count bad lines and images and go on")] = False,
) -> None:
    """Lets the target answer prompts about images: data to train a draft on."""
    from fastspec.training.distill import Distillation, distill

    asked = Distillation(
        target=target,
        images=images,
        prompts=prompts,
        out=out,
        draft=draft,
        temperatures=tuple(temperature or (0.0,)),
        gamma=gamma,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        seed=seed,
        dtype=dtype,
        device=_device(device),
        skip_bad_lines=skip_bad_lines,
    )
    result = distill(asked)
    if result["note"]:
        typer.echo(result["note"], err=True)
    typer.echo(
        f"{result['answers']} answers in {out}, {result['new']} of them new, {result['tokens']} tokens"
    )


@app.command("train-draft")
def train_draft(
    target: Annotated[str, typer.Option(help="a LLaVA checkpoint: directory, hub name, or 'miniature'")],
    out: Annotated[Path, typer.Option(help="the draft's folder; checkpoints go into OUT.run")],
    stage: Annotated[
        str, typer.Option(help="pretrain (text), instruct (chats) or distill (distilled answers)")
    ],
    data: Annotated[list[Path], typer.Option(help="a data file, and more after it")],
    more_data: Annotated[
        list[Path] | None, typer.Argument(metavar="[FILE]...", help="more data files")
    ] = None,
    draft: Annotated[str | None, typer.Option(help="a draft to train further")] = None,
    size: Annotated[
        str | None,
        typer.Option(help="of a new draft: 115m, tiny or hidden,layers,heads,ffn; 115m unless given"),
    ] = None,
    image_adapter: Annotated[
        bool, typer.Option("--image-adapter", help="a draft that sees the image")
    ] = False,
    image_pooling: Annotated[
        int,
        typer.Option(
            min=1, help="side of the squares of image features that become one token of a new adapter"
        ),
    ] = 1,
    train: Annotated[str, typer.Option(help="all, or adapter: the image adapter alone")] = "all",
    images: Annotated[
        Path | None, typer.Option(help="folder of images; each data file's own unless given")
    ] = None,
    loss: Annotated[
        str, typer.Option(help="cross-entropy, forward-kl, reverse-kl, total-variation or tvd++")
    ] = "cross-entropy",
    epochs: Annotated[float, typer.Option(min=0.0, help="passes over the data")] = 1.0,
    steps: Annotated[int, typer.Option(min=0, help="optimizer steps instead of epochs")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="examples per device and pass")] = 8,
    gradient_accumulation: Annotated[int, typer.Option(min=1, help="passes per optimizer step")] = 1,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="the highest")] = 3e-4,
    max_length: Annotated[
        int, typer.Option(min=2, help="tokens of an example, image tokens not counted")
    ] = 1024,
    held_out: Annotated[int, typer.Option(min=0, help="examples kept for the expected acceptance")] = 64,
    log_every: Annotated[int, typer.Option(min=1, help="steps between rows of losses.csv")] = 10,
    evaluate_every: Annotated[int, typer.Option(min=1, help="steps between evaluations")] = 500,
    save_every: Annotated[int, typer.Option(min=1, help="steps between checkpoints")] = 500,
    workers: Annotated[int, typer.Option(min=0, help="processes that prepare data")] = 0,
    seed: Seed = 0,
    device: Device = None,
    skip_bad_lines: Annotated[bool, typer.Option(help="count bad lines and go on")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the last good checkpoint")] = False,
    compile_layers: Annotated[
        bool, typer.Option("--compile", help="torch.compile, worth its minute on long runs on a GPU")
    ] = False,
) -> None:
    """Trains a draft for a target, on one device or with `accelerate launch -m fastspec train-draft ...`."""
    try:
        import accelerate  # noqa: F401, Trainer's own message comes late
    except ImportError:
        raise ValueError("train-draft needs accelerate: python -m pip install accelerate") from None
    from fastspec.training.train import Training, train_draft

    _device(device)
    asked = Training(
        target=target,
        out=out,
        stage=stage,
        data=(*data, *(more_data or ())),
        draft=draft,
        size=size,
        image_adapter=image_adapter,
        image_pooling=image_pooling,
        train=train,
        images=images,
        loss=loss,
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        gradient_accumulation=gradient_accumulation,
        learning_rate=learning_rate,
        max_length=max_length,
        held_out=held_out,
        log_every=log_every,
        evaluate_every=evaluate_every,
        save_every=save_every,
        workers=workers,
        seed=seed,
        device=device,
        skip_bad_lines=skip_bad_lines,
        resume=resume,
        compile=compile_layers,
    )
    result = train_draft(asked)
    if not result["main_process"]:
        return
    if result["note"]:
        typer.echo(result["note"], err=True)
    acceptance = result["expected_acceptance"]
    expected = "" if acceptance is None else f", expected acceptance {acceptance:.3f}"
    typer.echo(f"{result['parameters']:,} parameters in {out} after {result['steps']} steps{expected}")
    if result["tokens_per_second"]:
        memory = result["peak_memory_bytes"]
        most = f", at most {memory / 2**30:.1f} GiB of GPU memory" if memory else ""
        typer.echo(f"{result['tokens_per_second']:,.0f} tokens per second{most}")


@app.command("shrink-draft")
def shrink_draft(
    draft: Annotated[str, typer.Option(help="a text-only draft checkpoint, or 'miniature'")],
    out: Annotated[Path, typer.Option(help="the compact draft's folder")],
    vocabulary: Annotated[int | None, typer.Option(help="tokens it can propose; all unless given")] = None,
    answers: Annotated[
        list[Path] | None, typer.Option(help="distilled answers whose frequent tokens are kept; repeatable")
    ] = None,
    weights: Annotated[
        str,
        typer.Option(help="int8 (dequantised when loaded, but for a CPU in bfloat16), or full: as they are"),
    ] = "full",
    skip_bad_lines: Annotated[bool, typer.Option(help="count bad lines and go on")] = False,
) -> None:
    """Makes a compact copy of a draft: fewer tokens to propose, weights in 8 bits."""
    from fastspec.training.shrink import Shrinking, shrink

    _device("cpu")
    result = shrink(Shrinking(draft, out, tuple(answers or ()), vocabulary, weights, skip_bad_lines))
    if result["note"]:
        typer.echo(result["note"], err=True)
    typer.echo(
        f"{out}: {result['vocabulary']} of {result['of']} tokens, "
        f"{result['coverage']:.2%} of the answers; weights {result['weights']}"
    )


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False) -> None:
    """Shows versions, GPUs, backends, the attention that reads prompts, and why one is off."""
    from fastspec.info import collect

    facts = collect()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(f"fastspec {facts['fastspec']} at {facts['location']}")
    console.print(f"Python {facts['python']}, CUDA of torch: {facts['cuda'] or 'none'}")
    for name, version in facts["packages"].items():
        console.print(f"  {name:<14}{version or 'not installed'}")
    for gpu in facts["gpus"]:
        console.print(
            f"GPU: {gpu['name']}, compute capability {gpu['compute_capability']}, "
            f"{gpu['memory_gib']} GiB, {gpu['multiprocessors']} multiprocessors"
        )
    if not facts["gpus"]:
        console.print("GPU: none that torch can use")
    for kind, width in (("backend", 10), ("attention", 14)):
        for one in facts["backends" if kind == "backend" else kind]:
            state = "on " if one["available"] else "off"
            console.print(f"{kind} {one['name']:<{width}}{state}  {one['reason']}")
    for warning in facts["warnings"]:
        console.print(f"warning: {warning}")


def _device(device: str | None) -> str:
    """The device to use; also silences what would come between the lines of an answer."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    gpu = torch.cuda.is_available()
    if device is None:
        return "cuda" if gpu else "cpu"
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu, cuda or cuda:INDEX, got {device!r}")
    if kind == "cuda" and not gpu:
        raise ValueError(f"device {device!r} was asked for, but torch finds no NVIDIA GPU")
    return device


def main() -> None:
    """Entry point; bad input ends with its message instead of a traceback."""
    try:
        app()
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
