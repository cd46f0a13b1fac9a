"""The agent's settings, as they stand in agent.toml. Reads nothing but the environment's home directory."""

from __future__ import annotations

import codecs
import re
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from broker_config.settings import BrokerSettings
from sidestream.accelerator.choice import check_choice
from sidestream.backbone.runtimes import RuntimeChoice
from sidestream.contract.errors import ConfigError
from sidestream.contract.topics import check_name
from sidestream.contract.wire import prepared
from sidestream.host.logs import LogFormat
from sidestream.host.state_dir import default_dir

WeightsChoice = Literal["every", "final"]
"""Which versions of the weights a device listens for."""
_PART = re.compile(r"(\d{1,6})/(\d{1,6})")


def parse_part(text: str) -> tuple[int, int]:
    """Read ``k/n`` with k < n.

    Raises:
        ConfigError: if it is none.
    """
    match = _PART.fullmatch(text)
    if not match or int(match[1]) >= int(match[2]):
        raise ConfigError("data.evaluation_part", f"{text!r} is no part; write k/n with k from 0 to n-1")
    return int(match[1]), int(match[2])


def is_encoding(name: str) -> bool:
    """Whether text can be written in what has that name."""
    try:
        codecs.lookup(name)
        return bool("a".encode(name))
    except (LookupError, ValueError, TypeError):
        return False


@prepared
class DataConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the device's samples come from: the ``[data]`` table."""

    path: str = ""
    """A file (JSON lines, a JSON array, CSV, TSV, packed by gzip or not, or Parquet), a folder of such files,
    a folder of images, a folder that datasets saved, or - for standard input. Empty: no data of its own; the
    device only receives weights and predicts."""
    format: Literal["auto", "jsonl", "csv", "tsv", "parquet", "images"] = "auto"
    """How rows are written; auto goes by the file's name, or by the first line of standard input. jsonl takes
    arrays and whole documents too. images: path is a folder of images, each label a sub-folder of it, or a
    file whose rows name images; auto takes a folder with images and no files of rows for that."""
    image_column: Annotated[str, msgspec.Meta(min_length=1)] = "image"
    """Of a file whose rows name images: the column (JSONL: key) with the path, relative to the file."""
    delimiter: str = ""
    """What stands between the columns of CSV and TSV: one character, or tab. Empty: it is found by the
    header."""
    encoding: str = "auto"
    """What the text is written in, such as cp1252 or utf-16-le; auto goes by the file's mark, and takes UTF-8
    where it has none."""
    text_column: Annotated[str, msgspec.Meta(min_length=1)] = "text"
    """The column (JSONL: key) that holds the text. In JSONL it may be a list of words."""
    label_column: str = "label"
    """The column (JSONL: key) that holds the label. Empty: the rows have no labels."""
    text_pair_column: str = "text_pair"
    """The column (JSONL: key) that holds the second text of a pair; rows need not have it. Empty: never."""
    watch: bool = False
    """Keep looking for new files in the folder, and for rows appended to files."""
    poll_s: Annotated[float, msgspec.Meta(ge=0.05, le=3600)] = 2.0
    """How often a watched folder or file is looked at."""
    held_out_share: Annotated[float, msgspec.Meta(ge=0, le=0.9)] = 0.1
    """The share of samples that is never uploaded and measures accuracy here instead, chosen by a hash of the
    text; of the first hundred samples never more than that share. 0 where evaluation_path is set."""
    evaluation_path: str = ""
    """A file of samples that measure accuracy instead of a held-out share."""
    evaluation_max_samples: Annotated[int, msgspec.Meta(ge=0, le=100_000)] = 1000
    """Measure accuracy on at most so many samples."""
    evaluation_max_tokens: Annotated[int, msgspec.Meta(ge=1, le=10_000_000)] = 4096
    """Measure a language model on at most so many of their tokens; what they need is kept in memory."""
    evaluation_part: str = "0/1"
    """k/n: use every n-th row of the evaluation file, from row k on, so that n devices share one file."""
    plugin: str = ""
    """An installed plug-in (entry point group sidestream.sources) that yields the samples instead."""

    def __post_init__(self) -> None:
        parse_part(self.evaluation_part)
        if self.delimiter not in ("", "tab") and (len(self.delimiter) != 1 or self.delimiter in '\r\n"'):
            raise ConfigError("data.delimiter", f"{self.delimiter!r} is not one character, nor tab")
        if self.encoding != "auto" and not is_encoding(self.encoding):
            raise ConfigError("data.encoding", f"{self.encoding!r} is no encoding of text; such as cp1252")
        if self.format == "images" and (self.plugin or self.path == "-"):
            raise ConfigError(
                "data.format", "images come as files: name a folder of them, or a list of paths"
            )
        if self.plugin and self.path:
            raise ConfigError("data.plugin", "a plug-in replaces data.path; give one of the two")


@prepared
class PredictConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the device predicts: the ``[predict]`` table."""

    remote: bool = False
    """In a split job, on a device without room for the whole model: have the trainer predict, if it may
    (remote = true in its own table [predict]). It and the broker get what this device's layers make of each
    text, from which the text can be read."""
    timeout_s: Annotated[float, msgspec.Meta(gt=0, le=3600)] = 30.0
    """How long to wait for the trainer's answer."""


@prepared
class AgentConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything an agent must be told; what is not here it learns from the job's plan."""

    job: str
    """Name of the job to take part in, as in the trainer's settings."""
    broker: BrokerSettings = BrokerSettings()
    """How to reach the broker."""
    data: DataConfig = DataConfig()
    """Where samples come from."""
    trusted_keys_file: str = ""
    """PEM file of the trainer's public keys: no plan and no weights are adopted but what one of them signed.
    Enrolment writes it. Empty: the device adopts whatever the broker delivers."""
    device: str = ""
    """This device's name in the fleet. Empty: its host's name, with a few digits of the machine's id where
    others are called the same."""
    tier: str = ""
    """Its hardware tier, one of those in the plan. Empty: detected from the board (pi4, pi5, jetson-orin, …;
    generic where it is none of these)."""
    backbone: str = ""
    """Where this device has the tier's backbone, if not where the plan says: a folder, a hub name, or
    package:NAME. It must be the same model, or a folder that sidestream backbone export made of it."""
    runtime: RuntimeChoice = "auto"
    """What computes the backbone: torch, or onnx (onnxruntime) for an exported folder, which takes neither
    torch nor transformers; auto goes by what the backbone is."""
    compute_device: str = "auto"
    """Where the backbone is computed: auto (the first GPU that works with the installed torch or onnxruntime,
    else the processor), cpu, cuda or cuda:N. The log says which, and why."""
    whole_model: Literal["auto", "always", "never"] = "auto"
    """In a split job, whether the device may load all layers to measure and predict with the final weights:
    auto where it has twice their memory free. It trains in any case, with its own layers only."""
    predict: PredictConfig = PredictConfig()
    """How the device predicts."""
    state_dir: str = ""
    """Folder for the outbox and the adopted weights. Empty: below ~/.local/state/sidestream."""
    threads: Annotated[int, msgspec.Meta(ge=0, le=1024)] = 0
    """Processor threads for the backbone; 0 leaves it to the runtime."""
    outbox_max_mib: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 256
    """Batches that wait for the trainer take up this much disk space at most; in a split job, what it has of
    batches that come again takes half as much beside them."""
    keep_receipted_share: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.5
    """Share of outbox_max_mib in which batches stay that the trainer has receipted, until its operator has
    backed them up: should its journal be set back to a backup, it gets from here what that lacks. 0: none."""
    unlabelled_max_mib: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 64
    """Samples that wait for a label take up this much disk space at most, with their activations; beyond it
    the oldest are dropped and counted. 0: samples without a label are skipped."""
    bytes_per_sample: Annotated[int, msgspec.Meta(ge=0)] = 0
    """A sample's upload may take so many bytes, on average. The agent sends as much of each sample as that
    allows, by the ladder in the job's plan. 0: no such budget."""
    max_kib_per_minute: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """Upload at most so many KiB in a minute: the agent sends less of each sample as its outbox fills, and
    then waits. 0: no such budget."""
    weights: WeightsChoice = "every"
    """Which versions of the weights come down: every one that the trainer publishes, or final: the finished
    ones, and the first good one until there is one. Where the job's method needs every version, every version
    comes."""
    weights_budget_mib: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """Once so many MiB of weights have come down, listen for finished versions only. 0: no such budget."""
    when_full: Literal["pause", "drop_oldest"] = "pause"
    """What to do when the outbox is full: stop computing until there is room, or drop the oldest batches and
    count them."""
    broker_wait_s: Annotated[float, msgspec.Meta(ge=0)] = 20.0
    """Give up if the broker cannot be reached for so long after the start; 0 tries for ever. Once connected,
    an agent always tries for ever."""
    telemetry_every_s: Annotated[float, msgspec.Meta(ge=0.1, le=3600)] = 5.0
    """How often the device reports its counters while they change; a twelfth as often while they do not, and
    once a minute then."""
    exit_when_done: bool = False
    """Stop once all data is uploaded and receipted and the final weights are adopted and measured. Otherwise
    the agent stays and adopts every new version."""
    metrics_port: Annotated[int, msgspec.Meta(ge=-1, le=65535)] = -1
    """Serve this agent's own figures to Prometheus on this port; 0 takes any free one, -1 none. The trainer's
    port shows the whole fleet."""
    metrics_host: str = "127.0.0.1"
    """Where they are served; 0.0.0.0 lets other machines scrape."""
    serve_port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 9470
    """Where sidestream agent serve answers over HTTP; 0 takes any free port."""
    serve_host: str = "127.0.0.1"
    """On which address. Anything but loopback is open to whoever reaches it: there are no passwords."""
    serve_mqtt: bool = False
    """Whether it answers over MQTT too: requests on ask/TIER/DEVICE of the job, with MQTT 5's response topic
    and correlation data. Whoever the broker's access list lets write there is answered."""
    trace_path: str = ""
    """Append what is done when to this file, a JSON object a line, for a timeline; empty: do not."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """How much is logged."""
    log_format: LogFormat = "text"
    """How it is logged: text, or json for an object a line."""

    def __post_init__(self) -> None:
        check_name("job", self.job)
        check_choice("compute_device", self.compute_device)
        for field in ("device", "tier"):
            if value := getattr(self, field):
                check_name(field, value)

    @property
    def state_path(self) -> Path:
        """The state directory; where none is given, a folder of the job's in the user's state."""
        if self.state_dir:
            return Path(self.state_dir).expanduser()
        return default_dir("agent", self.job)
