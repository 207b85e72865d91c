"""What a device says of itself: architecture, system, and processors in clusters."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ticketkit.bench.devices import shown
from ticketkit.errors import DeviceError

# Every `say` is optional: what a device does not have stays unknown.
SCRIPT = """\
say machine "$(uname -m)"
say system "$(uname -s)"
say release "$(uname -r)"
say bits "$(getconf LONG_BIT 2>/dev/null)"
say abi "$(getprop ro.product.cpu.abi 2>/dev/null)"
say model "$(getprop ro.product.model 2>/dev/null || tr -d '\\000' 2>/dev/null </sys/firmware/devicetree/base/model)"
for cpu in /sys/devices/system/cpu/cpu[0-9]*; do
  [ "$(cat $cpu/online 2>/dev/null)" = 0 ] && continue
  say cpu "${cpu##*/cpu} khz=$(cat $cpu/cpufreq/cpuinfo_max_freq 2>/dev/null) capacity=$(cat $cpu/cpu_capacity 2>/dev/null)"
done
processor=
while read -r line; do
  case $line in
    processor*:*) processor=${line##*: } ;;
    'CPU part'*:*) say part "$processor ${line##*: }" ;;
    'model name'*:*) say name "${line#*: }" ;;
    Hardware*:*) say name "${line#*: }" ;;
  esac
done </proc/cpuinfo"""

ABIS = ("aarch64-linux", "x86_64-linux", "aarch64-android")
PARTS = {  # MIDR_EL1 part numbers of Arm's cores, from their technical reference manuals
    **{"0xd03": "Cortex-A53", "0xd04": "Cortex-A35", "0xd05": "Cortex-A55", "0xd07": "Cortex-A57", "0xd08": "Cortex-A72"},
    **{"0xd09": "Cortex-A73", "0xd0a": "Cortex-A75", "0xd0b": "Cortex-A76", "0xd0c": "Neoverse N1", "0xd0d": "Cortex-A77"},
    **{"0xd40": "Neoverse V1", "0xd41": "Cortex-A78", "0xd44": "Cortex-X1", "0xd46": "Cortex-A510", "0xd47": "Cortex-A710"},
    **{"0xd48": "Cortex-X2", "0xd49": "Neoverse N2", "0xd4d": "Cortex-A715", "0xd4e": "Cortex-X3", "0xd80": "Cortex-A520"},
    **{"0xd81": "Cortex-A720", "0xd82": "Cortex-X4", "0xd4f": "Neoverse V2"},
}
NAMES = {1: ["all"], 2: ["little", "big"], 3: ["little", "middle", "big"]}


@dataclass(frozen=True)
class Cpu:
    """A processor: its number, highest frequency in kHz, capacity (of 1024, the scheduler's) and part number, None where not told."""

    cpu: int
    max_khz: int | None = None
    capacity: int | None = None
    part: str | None = None


@dataclass(frozen=True)
class Cluster:
    """Processors of one sort."""

    name: str  # all; little, big; little, middle, big; with more sorts the middle ones are numbered
    cpus: tuple[int, ...]
    max_khz: int | None
    core: str  # its name where the part number is known, the part number else, "" for none

    def __str__(self) -> str:
        speed = "" if self.max_khz is None else f" at up to {self.max_khz / 1e6:.2f} GHz"
        return f"{self.name}: {len(self.cpus)}{' ' + self.core if self.core else ''} (cpu {ranges(self.cpus)}){speed}"


@dataclass(frozen=True)
class Facts:
    """A device: what `uname` and Android's properties say, and its processors that are online."""

    label: str
    machine: str
    system: str
    release: str
    android_abi: str
    model: str  # of the device or its processor
    cpus: tuple[Cpu, ...]
    bits: str = ""  # of user space, where told

    @property
    def abi(self) -> str:
        """One of ABIS. DeviceError for a device that no runner is built for."""
        known = {"aarch64": "aarch64", "arm64": "aarch64", "x86_64": "x86_64", "amd64": "x86_64", "arm64-v8a": "aarch64"}
        machine = known.get(self.android_abi or self.machine)
        system = "android" if self.android_abi else self.system.lower()
        found = f"{machine}-{system}"
        if found not in ABIS or self.bits == "32":
            got = f"{self.android_abi or self.machine or 'nothing'} on {'Android' if self.android_abi else self.system or 'nothing'}"
            words = f"{got}{' with a 32-bit user space' if self.bits == '32' else ''}"
            raise DeviceError(f"{self.label}: expected a device of {', '.join(ABIS)}, got {shown(words)[1:-1]}")
        return found

    @property
    def clusters(self) -> tuple[Cluster, ...]:
        """Processors by capacity, then frequency, slowest first; () where none are known."""
        sorts: dict[tuple[int, int, str], list[Cpu]] = {}
        for cpu in self.cpus:
            sorts.setdefault((cpu.capacity or 0, cpu.max_khz or 0, cpu.part or ""), []).append(cpu)
        ordered = [sorts[key] for key in sorted(sorts)]
        count = len(ordered)
        names = NAMES.get(count) or ["little", *(f"middle{i}" for i in range(1, count - 1)), "big"]
        return tuple(
            Cluster(name, tuple(cpu.cpu for cpu in cpus), cpus[0].max_khz, PARTS.get(cpus[0].part or "", cpus[0].part or ""))
            for name, cpus in zip(names, ordered, strict=bool(count))
        )

    def choose(self, text: str | None, threads: int = 1) -> tuple[int, ...]:
        """The processors that `--cpus` means; () for no pinning.

        None: where there are several clusters the fastest ones that together have `threads` processors, since a thread that wanders between
        sorts has no one speed. DeviceError for a cluster or processor that is not there.
        """
        clusters = self.clusters
        if text is None:
            chosen: tuple[int, ...] = ()
            for cluster in reversed(clusters):
                chosen = cluster.cpus + chosen if len(chosen) < threads else chosen
            return tuple(sorted(chosen)) if len(chosen) < len(self.cpus) else ()
        named = {cluster.name: cluster.cpus for cluster in clusters}
        if text in named:
            return named[text]
        chosen = numbers(text)
        online = {cpu.cpu for cpu in self.cpus}
        if not chosen or not set(chosen) <= online:
            there = "; ".join(map(str, clusters)) or "none that it tells of"
            raise DeviceError(
                f"--cpus: expected {' or '.join([*named, 'numbers such as 4-7'])}, got {shown(text)}; {self.label} has {there}"
            )
        return chosen


def parse(label: str, said: Sequence[str]) -> Facts:
    """Facts from what SCRIPT said. Numbers that are none are unknown; texts are made fit to be printed."""
    words: dict[str, str] = {}
    speeds: dict[int, tuple[int | None, int | None]] = {}
    parts: dict[int, str] = {}
    for line in said:
        key, _, value = line.partition(" ")
        if key == "cpu" and (found := re.fullmatch(r"(\d{1,4}) khz=(\d{0,9}) capacity=(\d{0,5})", value)):
            speeds[int(found[1])] = (int(found[2]) if found[2] else None, int(found[3]) if found[3] else None)
        elif key == "part" and (found := re.fullmatch(r"(\d{1,4}) (0x[0-9a-f]{1,4})", value)):
            parts[int(found[1])] = found[2]
        elif value:
            words.setdefault(key, shown(value, 80)[1:-1])
    cpus = tuple(Cpu(cpu, *speeds[cpu], parts.get(cpu)) for cpu in sorted(speeds))
    model = words.get("model") or words.get("name", "")
    texts = {name: words.get(name, "") for name in ("machine", "system", "release", "bits")}
    return Facts(label=label, android_abi=words.get("abi", ""), model=model, cpus=cpus, **texts)


def numbers(text: str) -> tuple[int, ...]:
    """Processor numbers of a list such as 0,4-7; () for what is none."""
    if not re.fullmatch(r"\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*", text, re.ASCII):
        return ()
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return tuple(sorted(found))


def ranges(cpus: Sequence[int]) -> str:
    """Processor numbers as a list such as 0,4-7."""
    pieces: list[list[int]] = []
    for cpu in sorted(cpus):
        if pieces and pieces[-1][1] == cpu - 1:
            pieces[-1][1] = cpu
        else:
            pieces.append([cpu, cpu])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in pieces)
