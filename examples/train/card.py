"""Fill in the model card from the training report, so that no number in it can go stale."""

from pathlib import Path
from typing import Any

TEMPLATE = Path(__file__).with_name("card_template.md")


def render_card(report: dict[str, Any], max_windows: int, sample_tokens: int) -> str:
    """The README of the checkpoint directory, from the content of `training_report.json`."""
    training, routing = report["training"], report["routing"]
    millions = {key: value / 1e6 for key, value in report["model"].items()}
    return TEMPLATE.read_text(encoding="utf-8").format(
        **millions,
        **training["recipe"],
        num_tokens=training["num_tokens"] / 1e6,
        num_threads=training["num_threads"],
        wall_min=training["wall_s"] / 60,
        cpu_s=training["cpu_s"],
        versions=", ".join(f"{name} {version}" for name, version in training["versions"].items()),
        max_windows=max_windows,
        sample_tokens=sample_tokens,
        min_load=100 * routing["min_load_of_fair_share_frac"],
        quality_table=_quality_table(report["domains"]),
        layer_table=_layer_table(routing["layers"]),
        expert_tables=_expert_tables(routing["layers"]),
        data_table=_data_table(report["corpus"]),
        continuations=_continuations(report["greedy_continuations"]),
    )


def _quality_table(domains: dict[str, dict[str, float]]) -> str:
    rows = [
        [name, f"{d['val_loss']:.3f}", f"{d['val_ppl']:.1f}", f"{d['val_bits_per_byte']:.2f}"]
        for name, d in domains.items()
    ]
    return _table(["domain", "loss", "perplexity", "bits per byte"], rows)


def _layer_table(layers: list[dict[str, Any]]) -> str:
    rows = [
        [
            str(index),
            f"{layer['load_cv']:.2f}",
            f"{layer['domain_expert_mutual_information_bits']:.2f}",
        ]
        for index, layer in enumerate(layers)
    ]
    return _table(["layer", "load CV", "mutual information, bits"], rows)


def _expert_tables(layers: list[dict[str, Any]]) -> str:
    """One row per layer and domain; the share is bold where the expert is much sought after."""
    rows = [
        [str(index), domain, *map(_percent, load_E)]
        for index, layer in enumerate(layers)
        for domain, load_E in layer["expert_load_frac_by_domain"].items()
    ]
    num_experts = len(rows[0]) - 2
    return _table(["layer", "domain", *(f"e{e}" for e in range(num_experts))], rows)


def _percent(load_frac: float) -> str:
    text = f"{100 * load_frac:.0f}"
    return f"**{text}**" if load_frac >= 0.25 else text


def _data_table(corpus: dict[str, dict[str, Any]]) -> str:
    rows = [
        [
            name,
            f"{domain['num_documents']:,}",
            f"{domain['num_chars'] / 1e6:.1f} M",
            f"{domain['num_train_tokens'] / 1e6:.2f} M",
            f"{domain['num_held_out_tokens'] / 1e6:.2f} M",
        ]
        for name, domain in corpus.items()
    ]
    header = ["domain", "documents", "characters", "training tokens", "held-out tokens"]
    return _table(header, rows)


def _continuations(samples: dict[str, dict[str, str]]) -> str:
    return "\n\n".join(
        f"**{domain}**\n\n```text\n{sample['prompt']}{sample['continuation']}\n```"
        for domain, sample in samples.items()
    )


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
