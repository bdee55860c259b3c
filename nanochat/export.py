"""Export a model: `python -m nanochat.export RUN_DIR --to DIR`, for Hugging Face transformers.

The folder is complete when its README.md, the model card, stands in it. Exits 78 with a message for
wrong arguments or a run that has nothing to export yet.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nanochat.arguments import export_parser
from nanochat.checkpoint import CheckpointError
from nanochat.hf import write_folder
from nanochat.load import Loaded, load_trained
from nanochat.offline import install_guard
from nanochat.rundir import EXIT_DONE, EXIT_SPEC, RunDir, RunDirError, atomic_write_text, find_run
from nanochat.spec import WEIGHT_STAGES, SpecError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CARD = "README.md"


def main(argv: Sequence[str] | None = None) -> int:
    """Export; returns the exit code of the contract."""
    args = export_parser().parse_args(argv)
    install_guard()
    try:
        run = find_run(args.run_dir)
        loaded = load_trained(
            run,
            args.stage,
            which="best" if args.best else "latest",
            device="cpu",
            dtype=DTYPES[args.dtype],
        )
        export(run, loaded, args.to)
    except (SpecError, RunDirError, CheckpointError) as e:
        sys.stderr.write(f"nanochat export: {e}\n")
        return EXIT_SPEC
    facts = {"to": str(args.to), "stage": loaded.stage, "step": loaded.step, "dtype": args.dtype}
    text = f"{loaded.model_id}, step {loaded.step}, is in {args.to}"
    sys.stdout.write((json.dumps(facts) if args.json else text) + "\n")
    return EXIT_DONE


def export(run: RunDir, loaded: Loaded, folder: Path) -> None:
    """Write the folder. Raises SpecError where it holds something else, or cannot be written."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").is_file():
        raise SpecError(f"{folder} holds something else; give an empty or a new folder")
    try:
        (folder / CARD).unlink(missing_ok=True)
        origin = {"run": run.spec().name, "stage": loaded.stage, "step": loaded.step}
        write_folder(folder, loaded.model, loaded.tokenizer, origin)
        atomic_write_text(folder / CARD, model_card(run, loaded))
    except OSError as e:
        raise SpecError(f"{folder} cannot be written: {e}") from None


def model_card(run: RunDir, loaded: Loaded) -> str:
    """What the model is and how good, in Markdown with the hub's front matter."""
    config = loaded.model.config
    header = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [nanochat]",
        "---",
        f"# {loaded.model_id}",
        "",
        f"Trained from nothing with nanochat kit: stage `{loaded.stage}`, step {loaded.step}.",
        "",
    ]
    heads = f"{config.n_head}"
    if config.n_kv_head < config.n_head:
        heads += f" ({config.n_kv_head} for keys and values)"
    facts = {
        "parameters": f"{loaded.model.num_params():,}",
        "layers, width, heads": f"{config.n_layer}, {config.n_embd}, {heads}",
        "vocabulary": f"{config.vocab_size:,} ({loaded.tokenizer.description['kind']})",
        "context": f"{config.seq_len:,} tokens",
        "training text": run.spec().data.source,
        "stages": ", ".join(s for s in WEIGHT_STAGES if run.is_done(s)) or loaded.stage,
    }
    lines = [*header, *_table(["fact", "value"], list(facts.items()))]
    scores = _scores(run, loaded.stage)
    if scores:
        lines += ["", "## Scores", "", *_table(["task", "metric", "value", "examples"], scores)]
    return "\n".join([*lines, "", *_usage(loaded)]) + "\n"


def _scores(run: RunDir, stage: str) -> list[tuple[Any, ...]]:
    """Rows of the evaluation of a stage, and its last val_bpb."""
    records = [r for r in run.metrics() if r.get("stage") == stage]
    rows: list[tuple[Any, ...]] = []
    validated = [r for r in records if r.get("val_bpb") is not None]
    if validated:
        rows.append(("validation text", "bits per byte", f"{validated[-1]['val_bpb']:.4f}", ""))
    for r in records:
        if "task" in r:
            value = f"{r['value']:.3f}"
            if r.get("stderr") is not None:
                value += f" ± {r['stderr']:.3f}"
            rows.append((r["task"], r["metric"], value, r.get("n", "")))
    return rows


def _table(head: list[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]


def _usage(loaded: Loaded) -> list[str]:
    """How to call it from Python."""
    call = [
        'messages = [{"role": "user", "content": "Who are you?"}]',
        "inputs = tokenizer.apply_chat_template(",
        '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
        ")",
    ]
    if loaded.stage == "base_train":
        call = ['inputs = tokenizer("<|bos|>Once upon a time", return_tensors="pt")']
    return [
        "## Use",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained("this folder")',
        'model = AutoModelForCausalLM.from_pretrained("this folder")',
        *call,
        "answer = model.generate(**inputs, max_new_tokens=64)",
        "print(tokenizer.decode(answer[0]))",
        "```",
        "",
        "Or with nanochat kit itself: `nanochat chat FOLDER`, `nanochat serve FOLDER`.",
    ]


if __name__ == "__main__":
    sys.exit(main())
