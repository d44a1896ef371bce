"""What config.json's `hasten.layers` says: each layer's own widths, ranks and experts, beyond the configuration's.

    "hasten": {"layers": [{"num_heads": 6, "num_kv_heads": 2, "intermediate_size": 1024,
                           "ranks": {"down": 96}, "experts": {"num": 16, "active": 4}}, ...]}

Each key may be absent: then the configuration's own number holds, and nothing is factorised or split. Knows no
families; what it reads is plain data, checked.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hasten.errors import ModelError

_WIDTHS = ("num_heads", "num_kv_heads", "intermediate_size")
_ROLES = ("q", "k", "v", "o", "gate", "up", "down")
_MOST = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Own:
    """One layer's entry; 0 where the configuration's number holds."""

    num_heads: int = 0
    num_kv_heads: int = 0
    intermediate_size: int = 0
    ranks: Mapping[str, int] = field(default_factory=dict)
    experts: int = 0
    active_experts: int = 0


def own_layers(config: Mapping[str, Any], count: int) -> list[Own]:
    """An entry for each of `count` layers. Raises ModelError for what makes no sense."""
    section = config.get("hasten")
    entries = section.get("layers") if isinstance(section, Mapping) else None
    if entries is None:
        return [Own()] * count
    if not isinstance(entries, Sequence) or isinstance(entries, str) or len(entries) != count:
        raise ModelError(f"config.json: hasten.layers must list {count} layers, found {entries!r:.80}")
    return [_own(entry, f"config.json: hasten.layers[{index}]") for index, entry in enumerate(entries)]


def with_layers(config: Mapping[str, Any], layers: Sequence[Any], usual: Sequence[Any]) -> dict[str, Any]:
    """The configuration with a `hasten.layers` that makes these spec.Layers of those, `usual`, which its own numbers
    describe; without one where they are the same."""
    section = {key: value for key, value in (config.get("hasten") or {}).items() if key != "layers"}
    entries = [_entry(layer, plain) for layer, plain in zip(layers, usual, strict=True)]
    if any(entries):
        section["layers"] = entries
    out = {key: value for key, value in config.items() if key != "hasten"}
    return {**out, "hasten": section} if section else out


def _entry(layer: Any, usual: Any) -> dict[str, Any]:
    entry: dict[str, Any] = {}
    if any(getattr(layer, key) != getattr(usual, key) for key in _WIDTHS):
        entry = {key: getattr(layer, key) for key in _WIDTHS}
    if layer.ranks:
        entry["ranks"] = dict(layer.ranks)
    if layer.experts:
        entry["experts"] = {"num": layer.experts, "active": layer.active_experts}
    return entry


def _own(entry: object, where: str) -> Own:
    data = _mapping(entry, where, (*_WIDTHS, "ranks", "experts"))
    widths = {key: _count(data[key], f"{where}.{key}") for key in _WIDTHS if key in data}
    heads, groups = widths.get("num_heads", 0), widths.get("num_kv_heads", 0)
    if bool(heads) != bool(groups) or (groups and heads % groups):
        raise ModelError(f"{where}: num_heads {heads}, num_kv_heads {groups}: expected both, the one a multiple")
    ranks = _mapping(data.get("ranks", {}), f"{where}.ranks", _ROLES)
    split = _mapping(data.get("experts", {}), f"{where}.experts", ("num", "active"))
    if split and set(split) != {"num", "active"}:
        raise ModelError(f"{where}.experts is {split!r}, expected num and active")
    num, active = (_count(split[key], f"{where}.experts.{key}") if split else 0 for key in ("num", "active"))
    if active > num:
        raise ModelError(f"{where}.experts: {active} of {num} cannot be active")
    return Own(
        **widths,
        ranks={role: _count(rank, f"{where}.ranks.{role}") for role, rank in ranks.items()},
        experts=num,
        active_experts=active,
    )


def _mapping(value: object, where: str, known: Sequence[str]) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ModelError(f"{where} is {value!r:.80}, expected names and values")
    for key in value:
        if key not in known:
            raise ModelError(f"{where} has a key {key!r}, expected some of {', '.join(known)}")
    return dict(value)


def _count(value: object, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _MOST:
        raise ModelError(f"{where} is {value!r:.80}, expected a positive whole number")
    return value
