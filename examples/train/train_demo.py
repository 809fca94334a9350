"""Train the demo checkpoint from scratch on the CPU and write all of its directory.

python examples/train/train_demo.py --out examples/demo-moe
"""

import argparse
import json
import re
import time
from dataclasses import replace
from pathlib import Path

import report
import torch
from card import render_card
from corpus import load_corpus
from tokens import encode, sample_batches, split_documents, train_tokenizer
from torch import Tensor
from training import Recipe, build_model, train
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

# Chosen by eye: where greedy decoding, which likes to loop, looks most like the domain. None ends
# in a blank, which the tokenizer would have joined to the next word.
PROMPTS = {
    "english": "Base class for",
    "scripture": "And it came to pass,",
    "python": "import os\nimport sys\n\nclass",
    "cpp": "namespace c10 {",
}


def main() -> None:
    """Build the corpus, train on it, save, then measure what was saved."""
    args = _parse_args()
    torch.set_num_threads(args.threads)
    recipe = replace(Recipe(), seed=args.seed, num_steps=args.steps)
    corpus = load_corpus(recipe.seed, recipe.max_domain_chars)
    tokenizer, train_N, held_out_N = prepare(corpus, recipe)
    model = build_model(recipe, tokenizer.eos_token_id, tokenizer.pad_token_id)

    started_s, started_cpu_s = time.monotonic(), time.process_time()
    batches = sample_batches(train_N, recipe.batch_size, recipe.sequence_tokens, recipe.seed)
    losses = train(model, batches, recipe)
    wall_s, cpu_s = time.monotonic() - started_s, time.process_time() - started_cpu_s

    save(model, tokenizer, args.out)
    saved = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    results = report.measure(saved, tokenizer, held_out_N, recipe)
    content: report.Json = {
        "model": report.describe_model(saved),
        "corpus": report.describe_corpus(corpus, train_N, held_out_N),
        "domains": report.describe_domains(results),
        "routing": report.describe_routing(results),
        "training": report.describe_training(losses, recipe, wall_s, cpu_s),
        "greedy_continuations": report.continue_prompts(saved, tokenizer, PROMPTS),
    }
    _write_json(args.out / "prompts.json", PROMPTS)
    _write_json(args.out / "training_report.json", content)
    card = render_card(content, report.MAX_WINDOWS, report.SAMPLE_TOKENS)
    (args.out / "README.md").write_text(card, encoding="utf-8")
    print(card)


def prepare(
    corpus: dict[str, list[str]], recipe: Recipe
) -> tuple[PreTrainedTokenizerFast, dict[str, Tensor], dict[str, Tensor]]:
    """Return the tokenizer and the token ids of each domain, for training and held out."""
    splits = {
        domain: split_documents(documents, recipe.held_out_frac)
        for domain, documents in corpus.items()
    }
    train_documents = [document for documents, _ in splits.values() for document in documents]
    tokenizer = train_tokenizer(train_documents, recipe.vocab_size, recipe.max_tokens)
    train_N = {domain: encode(tokenizer, split[0]) for domain, split in splits.items()}
    held_out_N = {domain: encode(tokenizer, split[1]) for domain, split in splits.items()}
    return tokenizer, train_N, held_out_N


def save(model: MixtralForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the checkpoint as the hub has it: bf16 safetensors with one tensor per expert."""
    model.generation_config = GenerationConfig(
        max_new_tokens=64,
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory of the checkpoint")
    parser.add_argument("--steps", type=int, default=Recipe.num_steps)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument(
        "--threads", type=int, default=1, help="2 is faster on an idle machine only"
    )
    return parser.parse_args()


def _write_json(path: Path, content: report.Json) -> None:
    """Indented, but with a list of numbers on one line."""
    text = json.dumps(content, indent=2) + "\n"
    one_line = re.sub(r"\[[^\[\]{}]*\]", lambda match: " ".join(match[0].split()), text)
    path.write_text(one_line, encoding="utf-8")


if __name__ == "__main__":
    main()
