"""Settings of ``steeple plan``: what is to be decided, for which model, on which hardware, within which limits."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from steeple.config import check_range
from steeple.errors import ConfigError, did_you_mean
from steeple.plan.machines import ALIASES, DTYPE_BYTES, MACHINES
from steeple.plan.paper import Window
from steeple.plan.presets import PRESETS

THIS_CPU = "this-cpu"
WITH_PRESET = ("preset", "window", "plots", "html")


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What ``steeple plan`` decides, and for what."""

    model: str = field(
        default="demo", metadata={"help": "target: folder with a config.json, demo, or a name such as llama-3-70b"}
    )
    hardware: str = field(
        default=THIS_CPU, metadata={"help": f"{THIS_CPU} (measured for a moment), {', '.join(MACHINES)}"}
    )
    devices: int = field(
        default=0, metadata={"help": "how many share every layer (tensor parallel); 0: the fewest that hold every cell"}
    )
    dtype: str = field(default="bfloat16", metadata={"help": "of keys and arithmetic"})
    weights: str = field(default="", metadata={"help": "dtype of the weights; empty: --dtype"})
    calibration: str = field(
        default="", metadata={"help": "JSON with a fitted step model; empty: the rates of the hardware, no overheads"}
    )
    draft: str = field(default="", metadata={"help": "the small model that drafts; empty: one of the target's family"})
    drafters: tuple[str, ...] = field(
        default=(), metadata={"help": "drafters to try; empty: those of --acceptance, else all that tau is known for"}
    )
    ks: tuple[int, ...] = field(default=(1, 2, 3, 4, 5, 6, 7, 8), metadata={"help": "draft lengths to try"})
    windows: tuple[int, ...] = field(
        default=(), metadata={"help": "windows to try, tau held as it is; empty: each drafter's own"}
    )
    batch: tuple[int, ...] = field(default=(64,), metadata={"help": "requests decoded together"})
    context: tuple[int, ...] = field(default=(2048,), metadata={"help": "positions of each request"})
    tau: tuple[str, ...] = field(
        default=(), metadata={"help": "tokens per round at --tau-k: DRAFTER=TAU, or one number for all drafters"}
    )
    tau_k: int = field(default=4, metadata={"help": "draft length at which --tau holds"})
    acceptance: str = field(
        default="", metadata={"help": "JSON of steeple bench: its measured acceptance by position and context"}
    )
    temperature: float = field(
        default=0.0, metadata={"help": "which rows of --acceptance count, and whether tokens are drawn"}
    )
    price: float = field(default=0.0, metadata={"help": "of one device for an hour; costs are in its currency"})
    memory: float = field(default=0.0, metadata={"help": "most memory in GB, all devices; 0: what they have"})
    latency: float = field(default=0.0, metadata={"help": "most milliseconds per token of a request; 0: any"})
    cost: float = field(default=0.0, metadata={"help": "most cost per million tokens; 0: any"})
    preset: str = field(default="", metadata={"help": f"a published heatmap instead of all this: {', '.join(PRESETS)}"})
    window: str = field(
        default="",
        metadata={"help": "with --preset: positions (64) or share of the context (1/8); empty: as published"},
    )
    plots: str = field(default="", metadata={"help": "folder to draw into; empty: none"})
    html: str = field(
        default="", metadata={"help": "file for a page to move batch, context, k, window and hardware in; empty: none"}
    )

    def __post_init__(self) -> None:
        if self.preset:
            self._check_preset()
            return
        if self.window:
            raise ConfigError("PlanConfig.window goes with preset; give windows for the windows of a search.")
        known = [THIS_CPU, *MACHINES, *ALIASES]
        if self.hardware.lower().replace("_", "-").replace(" ", "-") not in known:
            raise ConfigError(f"Hardware {self.hardware!r} is unknown. {did_you_mean(self.hardware.lower(), known)}")
        for name, value in (("dtype", self.dtype), ("weights", self.weights or self.dtype)):
            if value not in DTYPE_BYTES:
                raise ConfigError(f"PlanConfig.{name} = {value!r}. {did_you_mean(value, DTYPE_BYTES)}")
        self._check_numbers()

    def _check_preset(self) -> None:
        if self.preset not in PRESETS:
            raise ConfigError(f"Preset {self.preset!r} is unknown. {did_you_mean(self.preset, PRESETS)}")
        if self.window:
            Window.parse(self.window)
        for item in fields(self):
            if item.name not in WITH_PRESET and getattr(self, item.name) != item.default:
                raise ConfigError(
                    f"PlanConfig.{item.name} = {getattr(self, item.name)!r} does not go with preset = {self.preset!r}, "
                    "which is computed as it was published; leave one of them out."
                )

    def _check_numbers(self) -> None:
        for name in ("ks", "batch", "context"):
            if not getattr(self, name):
                raise ConfigError(f"PlanConfig.{name} is empty; give one value at least.")
        for name, most in (("ks", 63), ("windows", 1 << 24), ("batch", 1 << 20), ("context", 1 << 24)):
            for value in getattr(self, name):
                check_range("PlanConfig", name, value, 1, most)
        check_range("PlanConfig", "devices", self.devices, 0, 4096)
        check_range("PlanConfig", "tau_k", self.tau_k, 1, 63)
        check_range("PlanConfig", "temperature", self.temperature, 0.0, 100.0)
        for name in ("price", "memory", "latency", "cost"):
            check_range("PlanConfig", name, getattr(self, name), 0.0, 1e15)
        if self.cost and not self.price:
            raise ConfigError("PlanConfig.cost is a limit on money; give the price of a device for an hour as well.")
