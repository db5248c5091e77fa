"""Settings of a fleet simulation."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType

from steeple.config import check_range
from steeple.errors import ConfigError, did_you_mean
from steeple.plan.fleet.report import Objectives
from steeple.plan.fleet.simulate import LEAST_LOADED, ROUTES

AUTO, POISSON, TRACE, LOGNORMAL, FIXED = "auto", "poisson", "trace", "lognormal", "fixed"
CHOICES = MappingProxyType({"arrivals": (AUTO, POISSON, TRACE), "lengths": (AUTO, TRACE, LOGNORMAL, FIXED)})
RATE = 10.0  # requests per second where nothing says another
LOADS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
"""Multiples of the load that charts show."""


@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """The requests.

    Args:
        trace: CSV with TIMESTAMP, ContextTokens, GeneratedTokens; empty = none
        arrivals: trace, poisson, or auto (the trace if there is one)
        lengths: trace, lognormal, fixed, or auto (the trace if there is one, else lognormal)
        rate: requests per second; 0 = the trace's own, or 10 without a trace
        requests: how many; a trace is repeated
        prompt: mean prompt tokens
        output: mean output tokens
        sigma: deviation of the logarithm of lognormal lengths
        seed: decides arrivals, lengths and tokens per round
    """

    trace: str = ""
    arrivals: str = AUTO
    lengths: str = AUTO
    rate: float = 0.0
    requests: int = 20_000
    prompt: float = 1000.0
    output: float = 250.0
    sigma: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(f"LoadConfig.{name} = {value!r} is unknown. {did_you_mean(value, known)}")
            if value == TRACE and not self.trace:
                raise ConfigError(f"LoadConfig.{name} = {TRACE!r} needs a trace; give --trace FILE.csv.")
        check_range("LoadConfig", "rate", self.rate, 0.0, 1e9)
        check_range("LoadConfig", "requests", self.requests, 2, 10**9)
        check_range("LoadConfig", "prompt", self.prompt, 1.0, 1e8)
        check_range("LoadConfig", "output", self.output, 1.0, 1e8)
        check_range("LoadConfig", "sigma", self.sigma, 0.0, 10.0)
        check_range("LoadConfig", "seed", self.seed, 0, 2**63 - 1)


@dataclass(frozen=True, kw_only=True)
class ReplicaConfig:
    """What every replica is.

    Args:
        model: a name of the table, or a folder with a config.json
        hardware: a name of the table of machines
        tp: GPUs of a replica, which share every layer
        dtype: of weights, keys and values
        weights: of the weights alone, such as int8; empty = as dtype
        step_model: JSON of a step model, calibrated on the machine; empty = the datasheet's rates
        memory_share: of each GPU's memory that weights and caches may fill
        kv_tokens: positions of a replica's cache; 0 = as many as memory holds
        max_batch: requests that a replica holds at once
        chunk: prompt tokens of a step
        watermark: share of the cache that admission leaves free
        price: of one GPU for an hour; 0 = not known
    """

    model: str = "llama-3.1-8b"
    hardware: str = "h100"
    tp: int = 1
    dtype: str = "bfloat16"
    weights: str = ""
    step_model: str = ""
    memory_share: float = 0.9
    kv_tokens: int = 0
    max_batch: int = 256
    chunk: int = 2048
    watermark: float = 0.01
    price: float = 0.0

    def __post_init__(self) -> None:
        check_range("ReplicaConfig", "tp", self.tp, 1, 1024)
        check_range("ReplicaConfig", "memory_share", self.memory_share, 0.01, 1.0)
        check_range("ReplicaConfig", "kv_tokens", self.kv_tokens, 0, 10**12)
        check_range("ReplicaConfig", "price", self.price, 0.0, 1e9)


@dataclass(frozen=True, kw_only=True)
class FleetConfig:
    """A fleet under a load, with and without drafters.

    Args:
        drafter: compared with plain decoding, as "name,k=4,tau=2.8,share=0.2", "name,k=4,tau=2.8,model=llama-3.2-1b"
            or "name,rates=0.8/0.7/0.6,share=0.2"; window=N limits what a draft model reads, cache=no says that it
            keeps no keys
        replicas: how many; 0 = the fewest that meet the objectives
        max_replicas: at which the search for them gives up
        route: round_robin, least_loaded or shortest_queue
        drawn: tokens per round are drawn; otherwise every round gives the mean
        warmup: share of the requests that latencies leave out
        highest_rate: also find the rate up to which plain decoding's fleet meets the objectives with each drafter
        loads: multiples of the load at which charts show all ways to decode; empty = 0.25 to 2 if charts are drawn
        plots: folder to draw charts into; empty: none
    """

    load: LoadConfig = field(default_factory=LoadConfig)
    replica: ReplicaConfig = field(default_factory=ReplicaConfig)
    objectives: Objectives = field(default_factory=Objectives)
    drafter: tuple[str, ...] = ()
    replicas: int = 0
    max_replicas: int = 4096
    route: str = LEAST_LOADED
    drawn: bool = True
    warmup: float = 0.1
    highest_rate: bool = False
    loads: tuple[float, ...] = ()
    plots: str = ""

    def __post_init__(self) -> None:
        check_range("FleetConfig", "replicas", self.replicas, 0, 10**6)
        check_range("FleetConfig", "max_replicas", self.max_replicas, 1, 10**6)
        check_range("FleetConfig", "warmup", self.warmup, 0.0, 0.9)
        for value in self.loads:
            check_range("FleetConfig", "loads", value, 1e-6, 1e6)
        if self.route not in ROUTES:
            raise ConfigError(f"FleetConfig.route = {self.route!r} is unknown. {did_you_mean(self.route, ROUTES)}")
