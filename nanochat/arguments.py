"""Arguments of the verbs that need torch, kept without it, so that `--help` answers at once."""

import argparse
import sys
from pathlib import Path
from typing import Any, NoReturn

EXIT_SPEC = 78
STAGE_OF = {"base": "base_train", "mid": "mid_train", "sft": "chat_sft", "rl": "chat_rl"}
"""The short names of `-i`."""
DEVICES = ("auto", "cpu", "cuda", "mps")


class Parser(argparse.ArgumentParser):
    """argparse with the contract's exit code for wrong arguments."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(EXIT_SPEC, f"{self.prog}: {message}\n")


def chat_parser(**options: Any) -> Parser:
    """Arguments of `nanochat chat`."""
    parser = Parser(
        prog="nanochat chat", description="Talk to a trained model in the terminal.", **options
    )
    _add_model(parser)
    parser.add_argument("--prompt", metavar="TEXT", help="print the answer to TEXT and end")
    parser.add_argument(
        "--temperature", type=float, help="default 0.6, with --prompt 0 (the likeliest answer)"
    )
    parser.add_argument("--top-k", type=int, default=50, help="likeliest tokens to choose from")
    parser.add_argument("--max-tokens", type=int, default=256, help="length of an answer at most")
    parser.add_argument("--seed", type=int, help="for the same answers again")
    _add_device(parser)
    parser.add_argument(
        "--json", action="store_true", help="with --prompt: the answer and its facts as JSON"
    )
    return parser


def serve_parser(**options: Any) -> Parser:
    """Arguments of `nanochat serve`."""
    parser = Parser(
        prog="nanochat serve",
        description="Serve a trained model: a web page and an OpenAI-compatible API.",
        **options,
    )
    _add_model(parser)
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0 is every one (default: this machine only)",
    )
    parser.add_argument("--port", type=int, default=8000, help="0: any free one (default 8000)")
    parser.add_argument(
        "--api-key-file", type=Path, help="file whose text every client must send as a bearer key"
    )
    parser.add_argument(
        "--cors-origin", action="append", default=[], help="site whose pages may use the API"
    )
    parser.add_argument("--max-batch", type=int, default=16, help="requests answered at a time")
    parser.add_argument(
        "--max-waiting", type=int, default=64, help="requests that may wait; more get 429"
    )
    parser.add_argument("--max-tokens", type=int, default=1024, help="of one answer")
    parser.add_argument("--max-body-kib", type=int, default=1024, help="of one request")
    parser.add_argument("--time-limit-s", type=float, default=300.0, help="of one answer")
    parser.add_argument("--drain-s", type=int, default=8, help="for answers in flight at the end")
    _add_device(parser)
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    return parser


def export_parser(**options: Any) -> Parser:
    """Arguments of `nanochat export`."""
    parser = Parser(
        prog="nanochat export",
        description="Write a model as Hugging Face transformers loads it (NanoChatForCausalLM).",
        **options,
    )
    _add_model(parser)
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="where to write")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the weights")
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")
    return parser


def _add_device(parser: Parser) -> None:
    parser.add_argument("--device", default="auto", choices=DEVICES)
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "fp32", "bf16"),
        help="of the weights: bf16 on CUDA, else fp32; bf16 is faster on CPUs with AMX",
    )


def _add_model(parser: Parser) -> None:
    parser.add_argument(
        "run_dir", metavar="RUN_DIR", help="a run, by folder or name, or an exported folder"
    )
    parser.add_argument(
        "-i",
        dest="stage",
        choices=STAGE_OF,
        help="whose weights: of base, mid, sft or rl training; unset: the newest. base continues "
        "text instead of answering",
    )
    parser.add_argument("--best", action="store_true", help="best validation instead of newest")
