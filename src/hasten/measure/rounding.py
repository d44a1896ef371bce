"""What a folder says of rounding that is not done here as it says: figures look better than other engines will see.

Our backends multiply as suits them (model/formats.py). A CPU does not round inputs of fp8 matrices at all, and those of
integer ones finer than the folder says; scales of keys and values are read by none.
"""

from hasten.model.checkpoint import Checkpoint
from hasten.model.formats import NARROW, activation_group


def notes_on_rounding(checkpoint: Checkpoint, device: str, kv_cache: str) -> tuple[str, ...]:
    """A line for each rounding that the folder declares and that is not done so on this device, with this KV cache."""
    notes = []
    formats = [fmt for _, _, fmt in checkpoint.matrices() if fmt.activations]
    floats = [fmt for fmt in formats if fmt.kind == "fp8"]
    if floats and (device == "cpu" or any(fmt.group_size or fmt.sparse24 for fmt in floats)):
        notes.append("inputs are declared fp8 and are not rounded here: other engines will lose more")
    elif any(fmt.activations == "fp8-static" for fmt in floats):
        notes.append(
            "inputs are declared fp8 with a scale known beforehand, and are rounded with one a token here: other "
            "engines may lose more"
        )
    integers = [fmt for fmt in formats if fmt.activations == "int8"]
    if integers and device == "cpu":
        narrow = " and in part to 16 bits" if checkpoint.spec.hidden_size <= NARROW else ""
        groups = sorted({activation_group(fmt) for fmt in integers})
        notes.append(
            "inputs are declared int8 with a scale a token, and are rounded here with one for "
            f"{' or '.join(map(str, groups))} numbers{narrow}: other engines may lose more"
        )
    elif any(fmt.kind == "int4" for fmt in integers):
        notes.append("inputs are declared int8 and are not rounded here: other engines will lose more")
    if any(True for _ in checkpoint.kv_scales()) or checkpoint.other_kv_scales():
        notes.append(
            f"keys and values are declared fp8 with scales, and are kept in {kv_cache} without them here: other "
            "engines may lose more"
        )
    return tuple(notes)
