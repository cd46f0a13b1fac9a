"""The trainer's settings: one TOML file, one frozen type beside each part."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from broker_config.settings import BrokerSettings
from side_trainer.settings.cells import CellConfig, check_cells
from side_trainer.settings.implied import MethodName
from side_trainer.settings.privacy import check_privacy, under_privacy
from side_trainer.settings.split import PredictConfig, SplitConfig, check_split
from side_trainer.settings.tier import TierConfig
from side_trainer.settings.tuning import TuningConfig, assignable, check_tuning
from sidestream.accelerator.choice import check_choice
from sidestream.contract.errors import ConfigError, WireError
from sidestream.contract.messages import check_labels
from sidestream.contract.plan import (
    MAX_TIERS,
    METHODS,
    FlowPlan,
    MethodPlan,
    SideNetworkSpec,
    Split,
    TierPlan,
    nested_taps,
    tap_layers,
)
from sidestream.contract.privacy import parse_privacy
from sidestream.contract.sampling import MAX_RUNGS, TOKEN_KINDS, parse_sampling
from sidestream.contract.spelling import normal
from sidestream.contract.tasks import TASKS, Task
from sidestream.contract.topics import check_name
from sidestream.contract.wire import Message, pack, prepared, unpack
from sidestream.host.logs import LogFormat
from sidestream.side_network.bundle import WeightsCodec

Positive = Annotated[float, msgspec.Meta(gt=0)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


@prepared
class LearnerSettings(Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that decides what weights a journal gives. A change is itself a journal record."""

    seed: Annotated[int, msgspec.Meta(ge=0, lt=2**31)] = 0
    """All randomness of the weights derives from this and a record's offset."""
    learning_rate: Positive = 2e-3
    """AdamW's, after warm-up."""
    weight_decay: Annotated[float, msgspec.Meta(ge=0)] = 0.3
    """AdamW's decoupled weight decay, of matrices only."""
    warmup_updates: Annotated[int, msgspec.Meta(ge=0)] = 20
    """Updates over which the learning rate rises from 0."""
    dropout: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.2
    """On normalised activations and before the head, while training."""
    replay: Annotated[int, msgspec.Meta(ge=0, le=64)] = 2
    """Updates on rows drawn from the journal after each update on received batches."""
    replay_rows: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 32
    """Rows of such an update."""
    update_rows: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 128
    """Rows of received batches that one update learns from, at most, where several batches wait. One alone
    is not divided; language models learn from one batch at a time."""
    passes: Annotated[float, msgspec.Meta(ge=0, le=1000)] = 4.0
    """Passes over the journal while nothing arrives."""
    pass_rows: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 32
    """Rows of an update in such a pass."""
    least_updates: Annotated[int, msgspec.Meta(ge=0, le=100_000)] = 400
    """Updates that few rows get at least, those that came with them included, before nothing is owed; as many
    passes are made. Of rows that join others they get their part."""
    device_share: Share = 0.25
    """The most that one device's rows count, of all rows' weight, however many it sends; no device is held to
    less than twice its equal share. 1 for no bound."""
    linear_start: bool = True
    """Whether labels a row have, beside the side-network, a linear answer in closed form."""
    final_rate: Share = 0.02
    """The learning rate falls to this share of itself over the passes, along half a cosine."""
    prior_correction: Annotated[float, msgspec.Meta(ge=0, le=2)] = 1.0
    """Strength of the logit adjustment by the label prior of all rows that teach an answer; 0 for plain
    cross-entropy."""
    label_smoothing: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.1
    """Of the targets."""
    exit_weight: Annotated[float, msgspec.Meta(ge=0)] = 1.0
    """Weight of what a deep tier's row teaches the shallower tiers' answers."""
    distillation: Share = 0.5
    """Share of that which comes from the row's own, deeper answer; the rest comes from the label."""
    averaging: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.99
    """Devices get a running mean of the weights with this memory an update; 0 gives them the last ones."""
    clip_norm: Positive = 1.0
    """Gradients are clipped to this norm; in a split job devices' and the trainer's, each on their own."""
    schedule: Literal["longest-tail", "fifo", "workload"] = "longest-tail"
    """In a split job, whose batch is served next, of those that have arrived: that of the device which will
    need longest for what then remains to it, the first to have arrived, or the one with the most work."""
    serve_together: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    """In a split job, up to so many waiting batches with the same cut share one update."""
    staleness: Annotated[int, msgspec.Meta(ge=0)] = 512
    """In a split job, a device's gradient is not learnt from when more batches than this were served since
    the one that it answers."""


@prepared
class SigningConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What plan and weights are signed with; the table ``[signing]``."""

    key_file: str = ""
    """PEM file of the Ed25519 private key, readable by its owner only; sidestream fleet init makes one.
    Empty: nothing is signed, and devices that were given a key to trust adopt nothing."""
    public_keys_file: str = ""
    """PEM file of the public keys that devices shall trust from now on, that of key_file among them; it is
    how a new key is made known before it is used. Empty: that of key_file only."""


@prepared
class TrainerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All of trainer.toml."""

    job: str
    """The job's name; devices give the same."""
    state_dir: str = ""
    """Journal and checkpoints; default: ``~/.local/state/sidestream/trainer/<job>``."""
    broker: BrokerSettings = BrokerSettings()
    """Where the broker is."""
    cells: tuple[CellConfig, ...] = ()
    """Where there are several brokers, each with devices of its own: tables ``[[cells]]`` with name, broker
    and perhaps state_dir. A trainer process serves each, started by torchrun, and all learn one side-network
    together (docs/cells.md). In place of broker; none for one trainer."""
    signing: SigningConfig = SigningConfig()
    """What plan and weights are signed with."""
    broker_wait_s: Annotated[float, msgspec.Meta(ge=0)] = 20.0
    """Give up if the broker cannot be reached for so long after the start; 0 tries for ever. Once connected,
    the trainer always tries for ever."""
    task: Task = Task.TEXT_CLASSIFICATION
    """What is learnt."""
    method: MethodName = "fed-mobillm"
    """How the job learns (docs/methods.md helps to choose). fed-mobillm: devices send each sample once, and a
    side-network is learnt beside the frozen model; mobillm: the same with one device, whose tier sends all
    tokens in nf4; split-lora: devices hold the first layers with LoRA, and every batch is answered with its
    gradient; split-frozen: the same, but devices' layers stay as they are, and each sample is sent once."""
    split: SplitConfig = SplitConfig()
    """What the two split methods go by."""
    predict: PredictConfig = PredictConfig()
    """What the trainer does for devices that cannot predict."""
    labels: tuple[str, ...] = ()
    """Label names in index order; default: those that the first devices bring, sorted."""
    label_devices: Annotated[int, msgspec.Meta(ge=1)] = 1
    """Without ``labels``: wait for so many devices before fixing them."""
    label_wait_s: Annotated[float, msgspec.Meta(ge=0)] = 20.0
    """Without ``labels``: and until no new label came for so long."""
    tiers: dict[str, TierConfig] = msgspec.field(default_factory=lambda: {"generic": TierConfig()})
    """By tier name."""
    privacy: str = ""
    """What devices do before anything is stored or sent, so that uploads reveal less: deep or deep:2 (only
    the last taps travel), mean, segments:2, random:2 or another policy, sketch:32 (so many random
    directions of each vector) and noise:0.5 (of that length, where vectors have length 1), with commas
    between them. None makes them unreadable: sidestream leakage measures what each leaves and costs, and
    docs/security.md has a table."""
    autotune: bool = False
    """Choose by telemetry, within the bounds of the table tuning, each device's batch size, token limit and
    way to send, and say which tier it would do better in."""
    tuning: TuningConfig = TuningConfig()
    """Within what bounds the trainer chooses for single devices."""
    side_network: SideNetworkSpec = SideNetworkSpec()
    """The side-network's shape."""
    learner: LearnerSettings = LearnerSettings()
    """Optimiser, replay, passes, seed."""
    flow: FlowPlan = FlowPlan()
    """How fast devices may send."""
    publish_every_s: Annotated[float, msgspec.Meta(ge=0)] = 1.0
    """Weights are published at most this often; the final ones at once."""
    publish_change: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.3
    """Weights that moved by less than this share of their norm wait for the next version; the final one does
    not. Every version costs every device its bytes."""
    publish_share: Annotated[float, msgspec.Meta(ge=0)] = 0.4
    """A version that is not final takes, to all devices, at most this share of the bytes that they have sent
    since the version before; until then it waits. 0: whatever it takes."""
    publish_gain: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.1
    """A version that is not final waits until its loss on the rows that came last is this share below that of
    the version before; of the first one, below that of untrained weights. 0: however good it is."""
    weights_codec: WeightsCodec = "packed"
    """How weights travel: f32, f16, int8, a quarter of f32's bytes, or packed, an eighth."""
    max_down_mib_s: Annotated[float, msgspec.Meta(ge=0)] = 16.0
    """A version waits until the one before it can have reached every online device at this rate, all of them
    together; 0 for no limit. It is the broker's uplink that this protects."""
    reply_keep_h: Annotated[float, msgspec.Meta(gt=0)] = 24.0
    """In a split job: how long the answer to a batch waits on the broker for a device that is away."""
    reply_patience_s: Annotated[float, msgspec.Meta(ge=0)] = 60.0
    """In a split job: for how long such a device holds up the version that is called final."""
    keep_days: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """Let batches go that came longer ago, once they are learnt from; what was learnt stays, and so does what
    tells a repeated sample from a new one. 0: keep all. Split jobs keep all."""
    keep_gib: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """Let the oldest batches go when the journal takes more than so many GiB. 0: no bound."""
    keep_samples: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Let the oldest batches go when there are more samples than this. 0: no bound."""
    checkpoint_every_s: Annotated[float, msgspec.Meta(gt=0)] = 10.0
    """Seconds of learning that a crash may cost (never data: it is learnt again from the journal)."""
    idle_after_s: Annotated[float, msgspec.Meta(ge=0)] = 2.0
    """Passes over the journal start when nothing came for so long."""
    max_backlog: Annotated[int, msgspec.Meta(ge=1)] = 100_000
    """Pause the devices when the learner is so many records behind the journal."""
    max_batches_per_s: Annotated[float, msgspec.Meta(ge=0)] = 200.0
    """A device's batches beyond this rate are dropped, and it sends them again; 0 for no limit. Five seconds'
    worth may come at once."""
    quarantine: bool = True
    """Keep, but do not learn from, what a device sends that is nothing like the other devices' of its tier;
    ``sidestream trainer quarantine`` shows and decides."""
    quarantine_max_mib: Annotated[int, msgspec.Meta(ge=1)] = 512
    """Room on the disk for what quarantined devices send, all of them together. What finds none stays on its
    device, which is told to wait."""
    cache_mib: Annotated[int, msgspec.Meta(ge=1)] = 256
    """Memory for decoded rows."""
    compute_device: str = "cpu"
    """Where the side-network is learnt: cpu, cuda, cuda:N, or auto, the first GPU that works. Weights are the
    same bits on one kind of device only, and the journal says which kind it was. Language models and the
    split methods are learnt on the processor."""
    threads: Annotated[int, msgspec.Meta(ge=1, le=256)] = 1
    """Threads of an update. The same number gives the same bits; another may differ in the last one."""
    metrics_host: str = "127.0.0.1"
    """Where metrics are served."""
    home_assistant: str = ""
    """Show each device in Home Assistant, by MQTT discovery below this prefix: homeassistant, unless yours
    has another. Empty: do not."""
    trackers: tuple[str, ...] = ()
    """Where else to write the page's curves, by version: tensorboard:DIR, mlflow:URI, or another NAME:WHERE
    of an installed tracker."""
    metrics_port: Annotated[int, msgspec.Meta(ge=-1, le=65535)] = 9464
    """Prometheus scrapes this port; 0 for a free one, -1 for none."""
    metrics_devices: Annotated[int, msgspec.Meta(ge=0, le=10_000)] = 50
    """How many devices get Prometheus series of their own, seven each: those known longest; 0 for none."""
    page: bool = True
    """Serve the fleet page, a live view for a browser."""
    page_host: str = "127.0.0.1"
    """Where it is served; anything but loopback lets whoever reaches it look, without a password."""
    page_port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 9465
    """Its port; 0 for a free one. If that is taken, the trainer says so and runs without the page."""
    trace_path: str = ""
    """Append what is done when to this file, a JSON object a line, for a timeline; empty: do not."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """How much it says."""
    log_format: LogFormat = "text"
    """How it is logged: text, or json for an object a line."""

    @property
    def brokers(self) -> list[BrokerSettings]:
        """Where its devices are: each cell's, or the one."""
        return [cell.broker for cell in self.cells] or [self.broker]

    def method_plan(self) -> MethodPlan:
        """The part of the plan that is the method's."""
        return self.split.plan(METHODS[self.method])

    def tier_plan(self, name: str) -> TierPlan:
        """A tier as devices see it before the first of them has come."""
        tier = self.tiers[name]
        plan = tier.to_plan(self.task)
        if not issubclass(METHODS[self.method], Split):
            return under_privacy(plan, parse_privacy(self.privacy), self.task)
        cut = 0 if tier.cut == "auto" else tier.cut
        return msgspec.structs.replace(
            plan, layers=cut, sampling="all", ladder=(), gradient_codec=tier.gradient_codec
        )

    def assignable(self, plan: TierPlan) -> TierPlan:
        """A tier's plan with what may be assigned to its devices, where the trainer chooses."""
        if not self.autotune:
            return plan
        return msgspec.structs.replace(plan, assignable=assignable(plan, self.task, self.tuning))

    def checked(self) -> TrainerConfig:
        """Return itself if its parts fit together.

        Raises:
            ConfigError: naming the field that does not.
        """
        check_name("job", self.job)
        check_choice("compute_device", self.compute_device)
        check_cells(self)
        if not self.tiers:
            raise ConfigError("tiers", "a job needs at least one tier; add a table [tiers.generic]")
        if len(self.tiers) > MAX_TIERS:
            raise ConfigError("tiers", f"{len(self.tiers)} tiers; a job has at most {MAX_TIERS}")
        for name, tier in self.tiers.items():
            self._check_tier(name, tier)
        if issubclass(METHODS[self.method], Split):
            check_split(self)
        check_tuning(self)
        sampled = {name: tier.samplings()[0][0] for name, tier in self.tiers.items() if tier.samplings()}
        check_privacy(parse_privacy(self.privacy), self.method, self.task, sampled)
        try:
            msgspec.structs.force_setattr(self, "labels", tuple(map(normal, self.labels)))
            check_labels(self.labels)
        except WireError as exc:
            raise ConfigError("labels", str(exc)) from exc
        if self.labels and not TASKS[self.task].named:
            raise ConfigError("labels", f"{self.task.value} has none; leave them out")
        if set(self.home_assistant) & set("+#$") or self.home_assistant.strip("/") != self.home_assistant:
            raise ConfigError("home_assistant", f"{self.home_assistant[:80]!r} is no prefix of topics")
        if len(self.labels) == 1:
            raise ConfigError("labels", "one label leaves nothing to learn; give two or more, or none")
        return self

    def _check_tier(self, name: str, tier: TierConfig) -> None:
        check_name(f"tiers.{name}", name)
        if not tier.backbone.strip():
            raise ConfigError(f"tiers.{name}.backbone", "is empty; name a model, a folder or package:NAME")
        for field, sampling in tier.samplings():
            _check_sampling(self.task, sampling, f"tiers.{name}.{field}")
        if tier.codes and not tier.codebooks:
            raise ConfigError(
                f"tiers.{name}.codec",
                f"{tier.codes[0].value} takes codebooks: fit some with sidestream backbone codebooks and "
                'name them with codebooks, or write codebooks = "shipped" if they come with Sidestream; or '
                "write int4",
            )
        if tier.gradient_codec.stages:
            raise ConfigError(f"tiers.{name}.gradient_codec", "gradients have no codebooks; write int8")
        if tier.head and not TASKS[self.task].generates:
            raise ConfigError(f"tiers.{name}.head", f"{self.task.value} needs none; leave it out")
        if len(tier.ladder) > MAX_RUNGS:
            raise ConfigError(f"tiers.{name}.ladder", f"has more than {MAX_RUNGS} rungs")
        if tier.align:
            check_name(f"tiers.{name}.align", tier.align)
        self._check_taps(name, tier)
        try:
            unpack(TierPlan, pack(tier.to_plan(self.task)))
        except WireError as exc:
            raise ConfigError(f"tiers.{name}", str(exc)) from exc

    def _check_taps(self, name: str, tier: TierConfig) -> None:
        if len(tier.taps) > self.side_network.blocks:
            raise ConfigError(
                f"tiers.{name}.taps",
                f"{len(tier.taps)} taps are more than side_network.blocks = {self.side_network.blocks}",
            )
        if list(tier.taps) != sorted(set(tier.taps)) or any(tap < 1 for tap in tier.taps):
            raise ConfigError(f"tiers.{name}.taps", "must ascend from 1 or later, none twice")
        if tier.layers and tier.taps and tier.taps[-1] > tier.layers:
            raise ConfigError(
                f"tiers.{name}.taps", f"layer {tier.taps[-1]} lies beyond layers = {tier.layers}"
            )

    def taps_of(self, name: str, depth: int) -> tuple[int, ...]:
        """The layers that tier ``name`` taps, its backbone being ``depth`` deep.

        Nested within the tiers that share its alignment map, where one of those is truncated.
        """
        return parse_privacy(self.privacy).kept(self._every_tap(name, depth))

    def _every_tap(self, name: str, depth: int) -> tuple[int, ...]:
        tier, blocks = self.tiers[name], self.side_network.blocks
        if tier.taps:
            return tier.taps
        family = tier.to_plan().align
        depths = [one.layers for one in self.tiers.values() if one.layers and one.to_plan().align == family]
        if not depths:
            return tap_layers(depth, blocks)
        return nested_taps(depth, blocks, min(*depths, depth))


def _check_sampling(task: Task, text: str, field: str) -> None:
    """A policy that suits the task: only real tokens have one that follows, and every word has a label."""
    kind = parse_sampling(text, field).kind
    if TASKS[task].generates and kind not in TOKEN_KINDS:
        raise ConfigError(field, f"{text!r} does not suit {task.value}; write all or random:0.5")
    if task is Task.TOKEN_CLASSIFICATION and kind != "all":
        raise ConfigError(field, f"{text!r} does not suit {task.value}: every word has a label; write all")
    if kind == "hardest" and not TASKS[task].generates:
        raise ConfigError(field, f"{task.value} has no loss on the device; write another policy")
