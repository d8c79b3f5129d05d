"""JSON objects in files, in and out."""

import json

from fm_jax.errors import UserError


def read_json(path):
    """Returns the object in a JSON file. Raises UserError where it holds none."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: not a JSON file ({e})") from None
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object, but a {type(value).__name__}")
    return value


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
