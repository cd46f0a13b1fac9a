"""A fleet of real processes, with the command lines that the README gives, on a tiny random backbone."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from side_trainer.operator.status import TrainerState, read_state
from sidestream.contract.tasks import TASKS, Modality, Task
from tests.agent.tiny import save_tiny
from tests.agent.tiny_lm import save_tiny_lm
from tests.agent.tiny_vision import file_of, save_tiny_vision
from tests.forked import Forked, Process
from tests.until import until as until

ROOT = Path(__file__).parents[2]
LABELS = ("cold", "dark", "loud")
WORDS = {
    "cold": ("warm", "heat", "cold", "up"),
    "dark": ("lights", "light", "switch", "on"),
    "loud": ("down", "off", "end", "please"),
}
_COMMAND_S = 150.0


def write_samples(path: Path, samples: int, *, seed: str) -> Path:
    """JSONL whose labels can be told from the words."""
    rng = random.Random(seed)
    with path.open("w") as file:
        for index in range(samples):
            label = rng.choice(LABELS)
            words = [
                *rng.choices(WORDS[label], k=rng.randint(2, 6)),
                *rng.choices(("the", "a", "now"), k=2),
            ]
            file.write(json.dumps({"text": " ".join(words), "label": label, "row": index}) + "\n")
    return path


def write_texts(path: Path, samples: int, *, seed: str) -> Path:
    """JSONL for a language model: plain texts, and prompts with completions."""
    rng = random.Random(seed)
    rows = []
    for number in range(samples):
        words = rng.choices(WORDS[rng.choice(LABELS)], k=rng.randint(2, 6))
        plain = {"text": " ".join(["the", *words])}
        rows.append(plain if number % 2 else {"prompt": "please", "completion": " " + " ".join(words)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_pictures(folder: Path, samples: int, *, seed: str) -> Path:
    """A folder of image files whose labels, its sub-folders, can be told from their colours."""
    for number in range(samples):
        place = number % len(LABELS)
        rng = np.random.default_rng([*seed.encode(), number])
        canvas = rng.integers(0, 60, (16, 16, 3))
        canvas[:, :, place] += 150
        path = folder / LABELS[place] / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file_of(Image.fromarray(canvas.astype(np.uint8))))
    return folder


class Processes:
    """Starts and ends processes, and knows where everything lies.

    Args:
        folder: Where everything is written.
        url: The broker's.
        job: The job's name.
        task: What it learns: to classify texts, or to go on from them.
        method: How.
        more: Of the trainer's settings, tables at their end.
    """

    def __init__(
        self,
        folder: Path,
        url: str,
        *,
        job: str = "e2e",
        task: Task = Task.TEXT_CLASSIFICATION,
        method: str = "fed-mobillm",
        more: str = "",
    ) -> None:
        self.method = method
        self.more = more
        self.task = task
        self.folder = folder
        self.url = url
        self.job = job
        self.backbone = folder / "model"
        if not self.backbone.exists():
            if TASKS[task].modality is Modality.IMAGE:
                save_tiny_vision(self.backbone)
            elif TASKS[task].generates:
                save_tiny_lm(self.backbone, "llama")
            else:
                save_tiny(self.backbone, "bert")
        self.trainer_state = folder / "trainer"
        self._running: list[Process] = []

    def write_data(self, device: str, samples: int) -> Path:
        if TASKS[self.task].modality is Modality.IMAGE:
            return write_pictures(self.folder / f"{device}-images", samples, seed=device)
        write = write_texts if TASKS[self.task].generates else write_samples
        return write(self.folder / f"{device}.jsonl", samples, seed=device)

    def trainer(self, *flags: str) -> Process:
        config = self.folder / "trainer.toml"
        if not config.exists():
            config.write_text(
                f'job = "{self.job}"\nstate_dir = "{self.trainer_state}"\ntask = "{self.task.value}"\n'
                f'method = "{self.method}"\n'
                "publish_share = 0.0\npublish_gain = 0.0\n"  # versions pass, however little there is
                + (f"labels = {json.dumps(LABELS)}\n" if TASKS[self.task].named else "")
                + f'metrics_port = 0\npage_port = 0\n[broker]\nurl = "{self.url}"\n[learner]\npasses = 2\n'
                f'[flow]\nretry_s = 1.0\n[tiers.small]\nbackbone = "{self.backbone}"\nbatch_size = 4\n'
                + self.more
            )
        return self.start("trainer", "trainer", "run", str(config), *flags)

    def agent(self, device: str, samples: int, *flags: str, tier: str = "small") -> Process:
        config = self.folder / f"{device}.toml"
        if not config.exists():
            config.write_text(
                f'job = "{self.job}"\ndevice = "{device}"\ntier = "{tier}"\n'
                f'state_dir = "{self.folder / device}"\nthreads = 1\nexit_when_done = true\n'
                f'telemetry_every_s = 0.5\n[broker]\nurl = "{self.url}"\n'
                f'[data]\npath = "{self.write_data(device, samples)}"\nheld_out_share = 0.0\n'
            )
        return self.start(device, "agent", "run", str(config), *flags)

    def start(
        self,
        name: str,
        *arguments: str,
        module: str = "sidestream.cli",
        env: Mapping[str, str] | None = None,
        fresh: bool = False,
    ) -> Process:
        """Run a module of ours; ``fresh``: with an interpreter that starts from nothing."""
        out, process = self.folder / f"{name}.log", None
        if fresh:
            with out.open("ab") as log:
                command = [sys.executable, "-m", module, *arguments]
                environment = {**os.environ, **(env or {})}
                process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, env=environment)
        started: Process = process or Forked(module, *arguments, out=out, cwd=ROOT, env=env)
        self._running.append(started)
        return started

    def run(self, *arguments: str, code: int = 0, patience_s: float = _COMMAND_S) -> str:
        """What a command that ends by itself says."""
        name = f"command-{len(self._running)}"
        ended = self.start(name, *arguments).wait(patience_s)
        said = (self.folder / f"{name}.log").read_text()
        assert ended == code, (ended, said)
        assert "Traceback" not in said
        return said

    def answer(self, device: str, text: str) -> str:
        """What a device says with the weights that it adopted."""
        state = str(self.folder / device)
        if TASKS[self.task].generates:
            return self.run("agent", "generate", "--state-dir", state, "--max-tokens", "8", text)
        label: str = json.loads(self.run("agent", "predict", "--state-dir", state, "--json", text))["label"]
        return label

    def state(self) -> TrainerState | None:
        """What the trainer's directory holds; None while there is nothing to read."""
        try:
            return read_state(self.trainer_state)
        except Exception:
            return None

    def trained(self) -> int:
        state = self.state()
        return state.samples_trained_unique if state else 0

    def journaled(self) -> int:
        state = self.state()
        return state.samples if state else 0

    def await_more_than(self, samples: int, *, most: int) -> None:
        until(lambda: samples < self.journaled() or self.journaled() == most, "the trainer journals")

    def expect_exit(self, process: Process, name: str, timeout_s: float = 150.0) -> None:
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{name} hangs: {self.log(name)}") from None
        assert code == 0, (code, self.log(name))

    def stop(self, process: Process, name: str) -> None:
        process.send_signal(signal.SIGTERM)
        self.expect_exit(process, name, 90)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()[-3000:]

    def close(self) -> None:
        for process in self._running:
            if process.poll() is None:
                process.kill()
            process.wait()
