"""Machines as numbers: arithmetic, memory and links of one device, each with its source; a table of public ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from steeple.errors import ConfigError, did_you_mean

DTYPE_BYTES: Mapping[str, float] = MappingProxyType(
    {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "float8": 1.0, "int8": 1.0, "int4": 0.5}
)
"""Bytes of one element by dtype."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One device. All figures are peaks without structured sparsity; what is reached is a step model's business.

    Args:
        name: how tables call it.
        flops_per_second: operations per second by dtype, a multiplication and an addition counted as two.
        bytes_per_second: read from memory.
        memory_bytes: of one device.
        link_bytes_per_second: to its neighbours, one direction, all links together; 0 = there is none.
        price_per_hour: of one device, in whatever currency the costs shall have; 0 = not known.
        source: where the figures are from.
    """

    name: str
    flops_per_second: Mapping[str, float] = field(hash=False)
    bytes_per_second: float
    memory_bytes: float
    link_bytes_per_second: float = 0.0
    price_per_hour: float = 0.0
    source: str = ""

    def __post_init__(self) -> None:
        amounts = {"bytes_per_second": self.bytes_per_second, "memory_bytes": self.memory_bytes}
        amounts |= {f"flops_per_second[{dtype}]": value for dtype, value in self.flops_per_second.items()}
        for name, value in amounts.items():
            if not value > 0:
                raise ConfigError(f"Machine.{name} = {value!r} of {self.name!r}; give more than 0.")
        for name in ("link_bytes_per_second", "price_per_hour"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"Machine.{name} = {getattr(self, name)!r} of {self.name!r}; give 0 or more.")
        if not self.flops_per_second:
            raise ConfigError(f"Machine.flops_per_second of {self.name!r} is empty; give it for one dtype at least.")
        object.__setattr__(self, "flops_per_second", dict(self.flops_per_second))

    def flops(self, dtype: str) -> float:
        """Operations per second in ``dtype``; ``ConfigError`` if the machine has no figure for it."""
        if dtype not in self.flops_per_second:
            raise ConfigError(
                f"{self.name} has no arithmetic in {dtype!r}. {did_you_mean(dtype, self.flops_per_second)}"
            )
        return self.flops_per_second[dtype]

    def flops_per_byte(self, dtype: str) -> float:
        """Operations that the machine does while it reads one byte (the paper's HOI, for elements of one byte)."""
        return self.flops(dtype) / self.bytes_per_second


def find_machine(name: str) -> Machine:
    """The machine ``name`` of the table; ``ConfigError`` with the nearest name if there is none."""
    key = name.lower().replace("_", "-").replace(" ", "-")
    key = ALIASES.get(key, key)
    if key not in MACHINES:
        raise ConfigError(f"Hardware {name!r} is unknown. {did_you_mean(key, [*MACHINES, *ALIASES])}")
    return MACHINES[key]


def _nvidia(
    name: str,
    *,
    bf16: float,
    int8: float,
    fp32: float,
    bandwidth: float,
    memory: float,
    link: float,
    fp8: float = 0.0,
    source: str,
) -> Machine:
    """Rates and bandwidth in tera, memory and link in giga; fp8 = 0: there is none."""
    rates = {"float32": fp32, "bfloat16": bf16, "float16": bf16, "int8": int8}
    rates |= {"float8": fp8} if fp8 else {}
    return Machine(
        name=name,
        flops_per_second={dtype: rate * 1e12 for dtype, rate in rates.items()},
        bytes_per_second=bandwidth * 1e12,
        memory_bytes=memory * 1e9,
        link_bytes_per_second=link * 1e9,
        source=source,
    )


def _apple(name: str, *, tflops: float, bandwidth: float, memory: float, arithmetic: str) -> Machine:
    """An Apple chip's GPU: one rate for 32 and 16 bits, memory shared with the processor."""
    rate = tflops * 1e12
    return Machine(
        name=name,
        flops_per_second={"float32": rate, "float16": rate, "bfloat16": rate},
        bytes_per_second=bandwidth * 1e9,
        memory_bytes=memory * 1e9,
        source=f"Apple's announcement (bandwidth, most memory); arithmetic: {arithmetic}",
    )


_HALVED = "dense rates are half of the printed ones with sparsity; NVLink in one direction"
_TABLE = (
    _nvidia(
        "h100",
        bf16=989.4,
        int8=1978.9,
        fp8=1978.9,
        fp32=66.9,
        bandwidth=3.35,
        memory=80,
        link=450,
        source=f"NVIDIA H100 datasheet, SXM5; {_HALVED}",
    ),
    _nvidia(
        "h100-pcie",
        bf16=756.0,
        int8=1513.0,
        fp8=1513.0,
        fp32=51.2,
        bandwidth=2.0,
        memory=80,
        link=300,
        source=f"NVIDIA H100 datasheet, PCIe with NVLink bridge; {_HALVED}",
    ),
    _nvidia(
        "h200",
        bf16=989.4,
        int8=1978.9,
        fp8=1978.9,
        fp32=66.9,
        bandwidth=4.8,
        memory=141,
        link=450,
        source=f"NVIDIA H200 datasheet, SXM; {_HALVED}",
    ),
    _nvidia(
        "b200",
        bf16=2250.0,
        int8=4500.0,
        fp8=4500.0,
        fp32=75.0,
        bandwidth=8.0,
        memory=180,
        link=900,
        source=f"NVIDIA DGX B200 datasheet, an eighth of the system; {_HALVED}",
    ),
    _nvidia(
        "a100",
        bf16=312.0,
        int8=624.0,
        fp32=19.5,
        bandwidth=2.039,
        memory=80,
        link=300,
        source="NVIDIA A100 datasheet, 80 GB SXM4, dense rates; NVLink in one direction",
    ),
    _nvidia(
        "l40s",
        bf16=362.05,
        int8=733.0,
        fp8=733.0,
        fp32=91.6,
        bandwidth=0.864,
        memory=48,
        link=32,
        source="NVIDIA L40S datasheet, dense rates; PCIe 4.0 x16 in one direction",
    ),
    _nvidia(
        "rtx-4090",
        bf16=165.2,
        int8=660.6,
        fp8=330.3,
        fp32=82.6,
        bandwidth=1.008,
        memory=24,
        link=32,
        source="NVIDIA Ada GPU architecture paper, dense rates with float32 sums; PCIe 4.0 x16 in one direction",
    ),
    Machine(
        name="mi300x",
        flops_per_second={
            "float32": 163.4e12,
            "bfloat16": 1307.4e12,
            "float16": 1307.4e12,
            "float8": 2614.9e12,
            "int8": 2614.9e12,
        },
        bytes_per_second=5.3e12,
        memory_bytes=192e9,
        link_bytes_per_second=448e9,
        source="AMD Instinct MI300X datasheet, dense rates; seven Infinity Fabric links of 64 GB/s in one direction",
    ),
    _apple(
        "m2-max",
        tflops=13.6,
        bandwidth=400,
        memory=96,
        arithmetic="38 cores at the 0.36 teraflops a core that Apple printed for the M2's ten",
    ),
    _apple(
        "m3-max",
        tflops=14.3,
        bandwidth=400,
        memory=128,
        arithmetic="not published; 40 cores x 256 operations x 1.398 GHz, the lowest clock that others report",
    ),
    _apple(
        "m4-max",
        tflops=16.2,
        bandwidth=546,
        memory=128,
        arithmetic="not published; 40 cores x 256 operations x 1.578 GHz, the lowest clock that others report",
    ),
)
MACHINES: Mapping[str, Machine] = MappingProxyType({machine.name: machine for machine in _TABLE})
"""Public machines by name. No prices: list prices of one device differ several times over between providers."""

ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "h100-sxm": "h100",
        "h200-sxm": "h200",
        "a100-80g": "a100",
        "a100-80gb": "a100",
        "4090": "rtx-4090",
        "rtx4090": "rtx-4090",
    }
)
