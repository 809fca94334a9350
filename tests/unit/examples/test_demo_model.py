"""The committed demo checkpoint loads, fits into git and uses all of its experts."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralForCausalLM
from transformers import PreTrainedTokenizerFast as Tokenizer

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
DEMO_MOE = EXAMPLES / "demo-moe"
MAX_CHECKPOINT_BYTES = 10 * 2**20
DEAD_BELOW_FAIR_SHARE_FRAC = 0.1

# Written for this test, in the manner of the four domains.
SAMPLES = {
    "english": """\
Return a copy of the object with the given values replaced. If the optional argument is true, the
default is used instead. The function raises an error when the file cannot be opened for reading.
""",
    "scripture": """\
And it came to pass in those days, that the king rose up early in the morning, and spake unto all
the people of the land, saying, Hear ye the word of the LORD, and walk in his ways.
""",
    "python": """\
class Reader:
    def __init__(self, path, mode='r'):
        self._path = path
        if mode not in ('r', 'rb'):
            raise ValueError(f"bad mode: {mode!r}")

    def close(self):
        return None
""",
    "cpp": """\
#pragma once
#include <ATen/core/Tensor.h>

namespace at::native {
template <typename T>
inline void copy_kernel(const Tensor& self, int64_t dim, T* out) {
  TORCH_CHECK(self.defined(), "expected a tensor");
}
} // namespace at::native
""",
}


def _load(name: str) -> ModuleType:
    """Import a module of `examples/train`, which is a folder of scripts and no package."""
    spec = importlib.util.spec_from_file_location(f"demo_{name}", EXAMPLES / "train" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


corpus = _load("corpus")
evaluate = _load("evaluate")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny tensors: on a busy machine, threads wait for each other longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return AutoTokenizer.from_pretrained(DEMO_MOE)


@pytest.fixture(scope="module")
def model() -> MixtralForCausalLM:
    return AutoModelForCausalLM.from_pretrained(DEMO_MOE, dtype=torch.float32)


class TestCheckpoint:
    def test_fits_into_git(self) -> None:
        size_bytes = sum(path.stat().st_size for path in DEMO_MOE.iterdir())
        assert size_bytes <= MAX_CHECKPOINT_BYTES

    def test_config_is_that_of_a_plain_mixtral(self) -> None:
        config = json.loads((DEMO_MOE / "config.json").read_text())
        assert config["architectures"] == ["MixtralForCausalLM"]
        assert config["dtype"] == "bfloat16"
        assert config["output_router_logits"] is False

    def test_has_no_missing_or_unexpected_weights(self) -> None:
        _, info = MixtralForCausalLM.from_pretrained(DEMO_MOE, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_continues_every_prompt(self, tokenizer: Tokenizer, dtype: torch.dtype) -> None:
        model = AutoModelForCausalLM.from_pretrained(DEMO_MOE, dtype=dtype)
        prompts = json.loads((DEMO_MOE / "prompts.json").read_text())
        assert set(prompts) == set(SAMPLES)
        for prompt in prompts.values():
            inputs = tokenizer(prompt, return_tensors="pt")
            ids_BS = model.generate(**inputs, max_new_tokens=4)
            assert ids_BS.shape[1] > inputs["input_ids"].shape[1]

    def test_tokenizer_is_lossless(self, tokenizer: Tokenizer) -> None:
        for text in (*SAMPLES.values(), "\N{SNOWMAN}\t\x00 do n't , ."):
            assert tokenizer.decode(tokenizer(text)["input_ids"]) == text

    def test_readme_names_the_licence_and_the_command(self) -> None:
        card = (DEMO_MOE / "README.md").read_text()
        assert "license: apache-2.0" in card
        assert "examples/train/train_demo.py --out examples/demo-moe" in card


@pytest.fixture(scope="module")
def counts_MLE(model: MixtralForCausalLM, tokenizer: Tokenizer) -> Tensor:
    """Tokens of each sample that each expert gets; M domains, L layers, E experts."""
    with torch.inference_mode():
        outputs = [
            model(**tokenizer(text, return_tensors="pt"), output_router_logits=True)
            for text in SAMPLES.values()
        ]
    return torch.stack([evaluate.count_tokens(out.router_logits, top_k=2) for out in outputs])


class TestExperts:
    def test_none_was_dead_on_the_validation_set(self) -> None:
        report = json.loads((DEMO_MOE / "training_report.json").read_text())
        for layer in report["routing"]["layers"]:
            load_E = torch.tensor(layer["expert_load_frac"])
            assert load_E.min() >= DEAD_BELOW_FAIR_SHARE_FRAC / len(load_E)

    def test_all_get_tokens_here_and_now(self, counts_MLE: Tensor) -> None:
        counts_LE = counts_MLE.sum(dim=0)
        load_LE = counts_LE / counts_LE.sum(dim=1, keepdim=True)
        assert evaluate.min_fair_share_frac(load_LE) >= DEAD_BELOW_FAIR_SHARE_FRAC

    def test_domains_prefer_different_experts(self, counts_MLE: Tensor) -> None:
        load_MLE = counts_MLE / counts_MLE.sum(dim=-1, keepdim=True)
        information_bits = [
            evaluate.mutual_information_bits(load_ME) for load_ME in load_MLE.unbind(dim=1)
        ]
        assert max(information_bits) > 0.2


class TestRoutingMetrics:
    def test_balanced_load_has_no_variation(self) -> None:
        assert evaluate.load_cv(torch.full((8,), 0.125)) == 0

    def test_one_expert_for_all_is_the_worst_case(self) -> None:
        load_E = torch.tensor([1.0, 0, 0, 0])
        assert evaluate.load_cv(load_E) == pytest.approx(3**0.5)
        assert evaluate.min_fair_share_frac(load_E[None]) == 0

    def test_mutual_information_spans_nothing_to_everything(self) -> None:
        assert evaluate.mutual_information_bits(torch.full((4, 8), 0.125)) == pytest.approx(0)
        assert evaluate.mutual_information_bits(torch.eye(4)) == pytest.approx(2)

    def test_counts_every_choice_of_every_layer(self) -> None:
        logits_TE = torch.tensor([[3.0, 2, 1], [1, 2, 3]])
        counts_LE = evaluate.count_tokens((logits_TE, -logits_TE), top_k=2)
        assert counts_LE.tolist() == [[1, 2, 1], [1, 2, 1]]


class TestCorpus:
    def test_docstrings_leave_the_code(self) -> None:
        code, docstrings = corpus.split_docstrings(
            '"""Module."""\n# note\nX = "kept"\n\ndef f():\n    """A\n    B."""\n    return X\n'
        )
        assert code == 'X = "kept"\n\ndef f():\n    return X'
        assert docstrings == ["Module.", "A\nB."]

    def test_unparsable_source_gives_nothing(self) -> None:
        assert corpus.split_docstrings("print 'python 2'") == ("", [])

    def test_cpp_loses_comments_and_guard_but_not_urls(self) -> None:
        source = (
            "#if !defined(TORCH_STABLE_ONLY) && !defined(X)\n"
            "/* licence\n * text */\n#pragma once\n  // note\n\n\n"
            'auto u = "http://x";\n\n#else\n#error "no"\n#endif  // !defined(X)\n'
        )
        stripped = corpus.strip_cpp_comments(corpus.strip_include_guard(source))
        assert stripped == '#pragma once\n\nauto u = "http://x";'

    def test_header_without_guard_stays_whole(self) -> None:
        source = "#pragma once\n#if defined(A)\nint a;\n#else\n#error no\n#endif\n"
        assert corpus.strip_include_guard(source) == source

    def test_verse_numbers_go(self) -> None:
        assert corpus.strip_verse_numbers("1:14 And 15 men: 1:15 Lo") == "And 15 men: Lo"

    def test_prose_is_told_from_tables(self) -> None:
        assert corpus.is_prose("The value of the argument is returned, as it was given. " * 5)
        assert not corpus.is_prose("0x1f 0b10 == [1, 2, 3] -> {4: 5} != (6, 7) " * 9)
        assert not corpus.is_prose("Too short.")

    def test_same_head_is_kept_once_and_in_order(self) -> None:
        head = "x" * 400
        documents = [head + "first", "short", "y" * 200, head + "second"]
        assert corpus.deduplicate(documents) == [head + "first", "y" * 200]

    def test_sample_repeats_with_the_seed_and_stops_at_the_limit(self) -> None:
        documents = [str(number) * 100 for number in range(10)]
        first, again = (
            corpus.sample_documents(documents, 250, corpus.random.Random(7)) for _ in range(2)
        )
        assert first == again
        assert len(first) == 3
        assert set(first) < set(documents)

    def test_long_document_is_cut(self) -> None:
        sampled = corpus.sample_documents(["z" * 50_000], 10**6, corpus.random.Random(0))
        assert [len(text) for text in sampled] == [corpus.MAX_DOCUMENT_CHARS]
