"""Runs in the client's Pod: generates text through the gateway's Service, and compares each call.

Lines of standard input say how many callers there are and how long each pauses between calls, like
"2 0.5"; "end" ends. Prints a line of JSON for each call, and "ready" before.
"""

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

from expertmesh.client import Client

TARGET = "dns:///gateway-headless.expertmesh:50052"
NEW_TOKENS = 16
_TIMEOUT_S = 60.0


def expected(model_dir: Path) -> list[tuple[str, tuple[int, ...]]]:
    """Prompts, and what unmodified transformers generates, greedily."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    tokenizer: Any = AutoTokenizer.from_pretrained(model_dir)
    found = []
    for prompt in json.loads((model_dir / "prompts.json").read_text()).values():
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = model.generate(
            ids, do_sample=False, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS
        )
        found.append((prompt, tuple(out[0, ids.shape[1] :].tolist())))
    return found


class Load:
    """Callers that come and go."""

    def __init__(self, answers: list[tuple[str, tuple[int, ...]]]) -> None:
        self._answers = answers
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def change(self, callers: int, pause_s: float) -> None:
        """End those there are, after their calls, and start others."""
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._call, args=(at, pause_s, self._stop))
            for at in range(callers)
        ]
        for thread in self._threads:
            thread.start()

    def _call(self, at: int, pause_s: float, stop: threading.Event) -> None:
        with Client(TARGET) as client:
            while not stop.is_set():
                self._say(_one(client, *self._answers[at % len(self._answers)]))
                stop.wait(pause_s)
                at += 1

    def _say(self, line: dict[str, object]) -> None:
        with self._lock:
            sys.stdout.write(json.dumps(line) + "\n")
            sys.stdout.flush()


def _one(client: Client, prompt: str, tokens: tuple[int, ...]) -> dict[str, object]:
    got: tuple[int, ...] = ()
    began_s, error = time.monotonic(), ""
    try:
        chunks = client.generate(
            prompt, max_new_tokens=NEW_TOKENS, ignore_eos=True, timeout_s=_TIMEOUT_S
        )
        got = tuple(token for chunk in chunks for token in chunk.tokens)
    except Exception as failure:  # everything that a call may end with is counted
        error = f"{type(failure).__name__}: {failure}"
    took_s = round(time.monotonic() - began_s, 3)
    return {"took_s": took_s, "error": error, "same": got == tokens, "got": got if error else ""}


def main(model_dir: Path) -> None:
    """Until "end"."""
    load = Load(expected(model_dir))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        if line.strip() == "end":
            break
        callers, pause_s = line.split()
        load.change(int(callers), float(pause_s))
    load.change(0, 0.0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
