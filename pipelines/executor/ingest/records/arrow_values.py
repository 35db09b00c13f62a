"""Functions that convert Arrow values of any type to Python, with limits on the size of a value.

A column may repeat one value of 60 MB a thousand times in a file of 60 KB. Arrow stores the repeated value once, in a
dictionary array, but a Python list of the column's values would take 60 GB. Large columns are therefore converted one
value after the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

WHOLE_COLUMN_BYTES = 16 * 2**20
"""Largest size of a column whose values are all converted together, in bytes."""
END_BYTES = 2**20
"""Number of bytes that are hashed at the beginning and at the end of a value that is not stored."""
OUT_OF_RANGE = "<value out of range"
"""Beginning of the text that Arrow writes instead of a date or time that is out of range."""
WHOLE_DIGITS = 1e16
"""Python writes all digits of a whole float below this limit, so an id that is stored as a float is exact."""
OBJECT_BYTES = 32
"""Approximate size of a Python object such as a number in a list, in bytes."""


def is_text(kind: pa.DataType) -> bool:
    """Return whether a type is one of Arrow's string types."""
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def is_bytes(kind: pa.DataType) -> bool:
    """Return whether a type is one of Arrow's binary types."""
    fixed = types.is_fixed_size_binary(kind) and not types.is_decimal(kind)
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind) or fixed)


def is_list(kind: pa.DataType) -> bool:
    """Return whether a type is one of Arrow's list types."""
    return bool(
        types.is_list(kind)
        or types.is_large_list(kind)
        or types.is_fixed_size_list(kind)
        or types.is_list_view(kind)
        or types.is_large_list_view(kind)
    )


def stored_type(kind: pa.DataType) -> pa.DataType:
    """Return the storage type of an extension type, and any other type unchanged."""
    return stored_type(kind.storage_type) if isinstance(kind, pa.BaseExtensionType) else kind


def stored(array: pa.Array) -> pa.Array:
    """Return the storage of an extension array, and any other array unchanged."""
    return stored(array.storage) if isinstance(array, pa.ExtensionArray) else array


def size_of(array: pa.Array) -> int:
    """Estimate how many bytes the values of an array would take as Python objects, without converting the values."""
    array = stored(array)
    kind, content = array.type, 0
    if types.is_dictionary(kind):
        if is_text(kind.value_type) or is_bytes(kind.value_type):
            content = pc.sum(_lengths(array.dictionary).take(array.indices)).as_py() or 0
    elif is_text(kind) or is_bytes(kind):
        content = pc.sum(_lengths(array)).as_py() or 0
    elif is_list(kind):
        content = size_of(array.flatten())
    elif types.is_map(kind):
        content = size_of(_map_entries(array))
    elif types.is_struct(kind):
        content = sum(size_of(array.field(index)) for index in range(kind.num_fields))
    return OBJECT_BYTES * len(array) + content


def _lengths(array: pa.Array) -> pa.Array:
    array = stored(array)
    if types.is_binary_view(array.type) or types.is_string_view(array.type):
        array = array.cast(pa.large_binary())
    return pc.cast(pc.binary_length(array), pa.int64())


def _map_entries(array: pa.Array) -> pa.Array:
    """Return the keys and values of all rows of a map array, as an array of structs."""
    start, end = array.offsets[0].as_py(), array.offsets[-1].as_py()
    return pa.StructArray.from_arrays(
        [array.keys.slice(start, end - start), array.items.slice(start, end - start)], names=["key", "value"]
    )


def each_value(column: pa.Array) -> Iterator[pa.Array]:
    """Yield each value of a column as an array of one value."""
    for row in range(len(column)):
        yield column.slice(row, 1)


def to_python(array: pa.Array) -> list[Any]:
    """Convert an array to Python values. Invalid UTF-8, which many programs write into strings, becomes U+FFFD.

    A value that Python cannot represent, such as a date in the year 14645, becomes a text with the exact value. If
    Arrow cannot write the value as text, the value becomes a NotRepresentable. The 32-bit float 0.1 becomes 0.1, and
    not 0.10000000149011612.
    """
    if types.is_float16(array.type) or types.is_float32(array.type):
        return _shortest_floats(array)
    try:
        if not _needs_pandas(array.type) and not _changes(array.type):
            values: list[Any] = array.to_pylist()
            return values
    except (ValueError, ArithmeticError, LookupError, TypeError, NotImplementedError, pa.ArrowException):
        pass
    if len(array) == 1:
        return [_part_by_part(stored(array))]
    return [to_python(value)[0] for value in each_value(array)]


def _needs_pandas(kind: pa.DataType) -> bool:
    """Return whether Arrow would import pandas to convert a value of this type."""
    return bool((types.is_timestamp(kind) or types.is_duration(kind)) and kind.unit == "ns")


def _changes(kind: pa.DataType) -> bool:
    """Return whether Arrow's conversion to Python changes values of this type, such as the digits of 32-bit floats."""
    if types.is_dictionary(kind):
        return _changes(kind.value_type)
    if types.is_float16(kind) or types.is_float32(kind) or types.is_time(kind):
        return True
    return any(_changes(kind.field(index).type) for index in range(kind.num_fields))


def _shortest_floats(array: pa.Array) -> list[float | None]:
    """Convert each float of 16 or 32 bits to the number with the fewest digits that rounds to the same float.

    A whole number below WHOLE_DIGITS keeps all its digits.
    """
    floats = array.to_numpy(zero_copy_only=False)
    exact = floats.astype(np.float64)
    is_whole = (np.abs(exact) < WHOLE_DIGITS) & (exact == np.floor(exact))
    values = np.where(is_whole, exact, floats.astype(str).astype(np.float64)).tolist()
    return [value if valid else None for value, valid in zip(values, array.is_valid().to_pylist(), strict=True)]


def _part_by_part(array: pa.Array) -> Any:
    """Convert an array that contains one value, part by part, because Arrow cannot convert the whole value."""
    kind = array.type
    value: Any = None
    if not array.is_valid()[0].as_py():
        return value
    if is_text(kind):
        value = content_of(array).to_pybytes().decode("utf-8", "replace")
    elif types.is_dictionary(kind):
        value = to_python(_value_of_dictionary(array))[0]
    elif is_list(kind):
        value = to_python(array.flatten())
    elif types.is_map(kind):
        value = [(entry["key"], entry["value"]) for entry in to_python(_map_entries(array))]
    elif types.is_struct(kind):
        value = {kind.field(index).name: to_python(array.field(index))[0] for index in range(kind.num_fields)}
    else:
        try:
            value = _exact_value(array)
        except pa.ArrowException:
            value = NotRepresentable(f"a value of type {kind}")
    return value


def _exact_value(array: pa.Array) -> Any:
    """Return the only element of an array as an exact text, or as a NotRepresentable if it is out of range.

    A time of day becomes a Python time if the time is a whole number of microseconds.

    Raises:
        pa.ArrowException: Arrow cannot write the value as text.
    """
    kind = array.type
    # The time zone is removed, because Arrow writes a wrong text for an out-of-range timestamp with a time zone.
    written = (array.cast(pa.timestamp(kind.unit)) if types.is_timestamp(kind) else array).cast(pa.string())[0].as_py()
    if written.startswith(OUT_OF_RANGE):
        return NotRepresentable(f"a value of type {kind}: {written}")
    if types.is_time(kind) and (kind.unit != "ns" or array.cast(pa.int64())[0].as_py() % 1000 == 0):
        return array[0].as_py()
    return array.cast(pa.string())[0].as_py()


class NotStored(dict[str, str]):
    """Placeholder for a value that is not stored.

    A placeholder is neither a text nor a picture. A replay therefore refuses a row with a placeholder in the column of
    the text or picture.

    Args:
        what: text that describes the value, such as "5,000 bytes; at most 100 are allowed".
        value: array whose only element is the value that is not stored, or None for a placeholder without a hash. The
            placeholder of a string or binary value contains a hash of the beginning and the end of the value (END_BYTES
            each).

    Attributes:
        what: text that describes the value, such as "5,000 bytes; at most 100 are allowed".
    """

    def __init__(self, what: str, value: pa.Array | None = None) -> None:
        super().__init__({"not stored": what})
        self.what = what
        buffer = None if value is None else _buffer(value)
        if buffer is not None:
            # A file may repeat a value of 60 MB many times, so only the beginning and the end of a value are hashed.
            ends = buffer.slice(0, min(END_BYTES, buffer.size)), buffer.slice(max(buffer.size - END_BYTES, 0))
            self["hash of its ends"] = hashlib.sha256(b"".join(end.to_pybytes() for end in ends)).hexdigest()


class NotRepresentable(NotStored):
    """Placeholder for a value that Python cannot represent and that Arrow cannot write as text."""


def _buffer(array: pa.Array) -> pa.Buffer | None:
    """Return the bytes of an array that contains one string or binary value, or None for a value of another type."""
    array = _value_of_dictionary(stored(array))
    return content_of(array) if is_text(array.type) or is_bytes(array.type) else None


def content_of(array: pa.Array) -> pa.Buffer:
    """Return the bytes of an array that contains one string or binary value, without copying the bytes."""
    kind, at = array.type, array.offset
    if types.is_binary_view(kind) or types.is_string_view(kind):
        return array[0].as_buffer()
    if types.is_fixed_size_binary(kind):
        return array.buffers()[1].slice(at * kind.byte_width, kind.byte_width)
    _, offsets, content = array.buffers()
    large = types.is_large_binary(kind) or types.is_large_string(kind)
    start, end = np.frombuffer(offsets, np.int64 if large else np.int32)[at : at + 2].tolist()
    return content.slice(start, end - start) if content else pa.py_buffer(b"")


def _value_of_dictionary(array: pa.Array) -> pa.Array:
    """Return the dictionary value of a dictionary array with one row, without a copy.

    An array that is not a dictionary array, or whose value is null, is returned unchanged.
    """
    if not types.is_dictionary(array.type) or not array.indices[0].is_valid:
        return array
    return stored(array.dictionary).slice(array.indices[0].as_py(), 1)


def whole_values(column: pa.Array, most: int) -> Iterator[Any]:
    """Yield the Python values of a column.

    If the column is larger than WHOLE_COLUMN_BYTES, each value of more than `most` bytes becomes a NotStored.
    """
    if size_of(column) <= WHOLE_COLUMN_BYTES:
        yield from to_python(column)
        return
    for value in each_value(column):
        size = size_of(value)
        yield to_python(value)[0] if size <= most else too_large(value, most)


def too_large(value: pa.Array, most: int) -> NotStored:
    """Return a NotStored for an array of one value that has more than `most` bytes."""
    return NotStored(f"a value of {size_of(value):,} bytes; at most {most:,} are allowed", value)


# ------------------------------------------------------------------------------------------------ pictures


def picture_values(name: str, column: pa.Array, most: int) -> Iterator[dict[str, Any]]:
    """For each value of a column, yield a dict with the picture's bytes or base64 text, and its path if it has a path.

    A picture may be binary, a base64 string, a list of byte values, a list that contains one picture, or Hugging Face's
    struct with the fields `bytes` and `path`. A value of another type is converted to a Python value.

    Args:
        name: name of the field; the path is in the field `<name>.path`.
        column: column whose values are pictures.
        most: largest size of a picture, in bytes. A larger picture becomes a NotStored.
    """
    for value in each_value(stored(column)):
        fields = {name: _picture(value, most)}
        if types.is_struct(value.type) and value.is_valid()[0].as_py() and value.type.get_field_index("path") >= 0:
            fields[f"{name}.path"] = to_python(value.field("path"))[0]
        yield fields


def _picture(array: pa.Array, most: int) -> Any:
    array = _value_of_dictionary(stored(array))
    kind = array.type
    if not array.is_valid()[0].as_py():
        return None
    if is_bytes(kind) or is_text(kind):
        return _whole_picture(array, most)
    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return _picture(array.field("bytes"), most)
    values = array.flatten() if is_list(kind) else pa.nulls(0)
    if is_list(kind) and types.is_integer(values.type) and not values.null_count:
        return _bytes_of_numbers(values, most)
    return _picture(values, most) if len(values) == 1 else next(whole_values(array, most))


def _whole_picture(array: pa.Array, most: int) -> bytes | str | NotStored:
    text, buffer = is_text(array.type), content_of(array)
    limit = most * 3 // 2 if text else most  # base64 has 4 characters for 3 bytes
    if buffer.size > limit:
        return NotStored(f"{buffer.size:,} bytes; at most {limit:,} are allowed", array)
    content: bytes = buffer.to_pybytes()
    try:
        return content.decode() if text else content
    except UnicodeDecodeError:  # some programs store the bytes of a picture file in a column of strings
        return content


def _bytes_of_numbers(values: pa.Array, most: int) -> bytes | list[int] | NotStored:
    """Convert a list of integers to bytes, or return the list if an integer is not a byte.

    A byte is an integer from 0 to 255, or any integer of an 8-bit type. A list of more than `most` integers becomes a
    NotStored.
    """
    if len(values) > most:
        return NotStored(f"a list of {len(values):,} numbers; at most {most:,} are allowed")
    numbers: np.ndarray = values.to_numpy(zero_copy_only=False)
    if numbers.dtype == np.int8:
        return numbers.tobytes()
    if len(numbers) and not 0 <= numbers.min() <= numbers.max() <= 255:
        listed: list[int] = next(whole_values(pa.ListArray.from_arrays([0, len(values)], values), most))
        return listed
    return numbers.astype(np.uint8).tobytes()
