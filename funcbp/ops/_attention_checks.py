"""What attention says of arguments that do not fit."""

import jax.numpy as jnp

from funcbp.core import InputError


def check(query, key, value, bias, mask, **settings):
    """Raises if the shapes do not fit or a setting is out of range."""
    if query.ndim not in (3, 4) or key.ndim != query.ndim or key.shape != value.shape:
        raise InputError(
            "query must have shape [batch, t, heads, width] or [t, heads, width], and key and "
            f"value [batch, s, key heads, width] or the like; got {query.shape}, {key.shape} and "
            f"{value.shape}; move the heads to the axis before the last"
        )
    (*batch, t, n, h), (*key_batch, s, k, key_h) = query.shape, key.shape
    if batch != key_batch or h != key_h:
        raise InputError(
            f"query {query.shape} and key {key.shape} must agree in batch size and width; check "
            "which projections they come from"
        )
    if k == 0 or n % k:
        raise InputError(
            f"the number of query heads must be a multiple of that of key heads, got {n} and {k}; "
            "check the axis before the last"
        )
    b = batch[0] if batch else 1
    _check_extras(bias, mask, (b, n, t, s), settings)
    check_settings(settings)
    _check_own(settings)


def _check_extras(bias, mask, full, settings):
    b, n, t, s = full
    for name, a in (("bias", bias), ("mask", mask)):
        if a is None:
            continue
        fits = all(m in (1, size) for m, size in zip(a.shape[::-1], full[::-1], strict=False))
        if a.ndim not in (3, 4) or not fits:
            raise InputError(
                f"{name} must broadcast to [batch, heads, t, s] = {full} and have 3 or 4 axes, "
                f"got {a.shape}; insert the missing axes, of size 1"
            )
    if mask is not None and mask.dtype != jnp.bool_:
        raise InputError(
            f"mask must be boolean, True where a query sees a key, got {mask.dtype}; pass numbers "
            "that are added to the scores as bias"
        )
    for name, size in (("query_seq_lengths", t), ("key_value_seq_lengths", s)):
        lengths = settings[name]
        if lengths is not None and (
            lengths.shape != (b,) or not jnp.issubdtype(lengths.dtype, jnp.integer)
        ):
            raise InputError(
                f"{name} must be {b} integers, one for each batch entry, up to {size}; got "
                f"{lengths.dtype} {lengths.shape}"
            )
    ids = [settings["query_segment_ids"], settings["key_value_segment_ids"]]
    if (ids[0] is None) != (ids[1] is None):
        raise InputError(
            "query_segment_ids and key_value_segment_ids must come together, got one of them; "
            "in self-attention pass the same array twice"
        )
    for a, size in zip(ids, (t, s), strict=True):
        if a is not None and a.shape not in ((b, size), (size,)[: b == 1]):
            raise InputError(
                f"segment ids must have shapes {(b, t)} for queries and {(b, s)} for keys, "
                f"got {ids[0].shape} and {ids[1].shape}; give one for each place"
            )


def check_settings(settings):
    """Raises if the window or the cap is out of range."""
    window, softcap = settings["local_window_size"], settings["softcap"]
    sides = (window,) * 2 if isinstance(window, int) else (0, 0) if window is None else window
    if len(sides) != 2 or min(sides) < 0:
        raise InputError(
            f"local_window_size must be one number from 0, or two, (left, right); got {window}"
        )
    if softcap is not None and softcap <= 0:
        raise InputError(f"softcap must be positive, got {softcap}; None for no cap")


def _check_own(settings):
    rate, implementation = settings["dropout_rate"], settings["implementation"]
    if not 0 <= rate < 1:
        raise InputError(
            f"dropout_rate must be from 0 to less than 1, got {rate}; it is the share of weights "
            "that are zeroed, not that are kept"
        )
    if rate and settings["dropout_key"] is None:
        raise InputError(
            f"dropout_key must be given for dropout_rate={rate}, got None; pass one from "
            "jax.random.split, another at each step"
        )
    if implementation not in (None, "xla", "cudnn"):
        raise InputError(
            f'implementation must be None, "xla" or "cudnn", got {implementation!r}; None runs '
            "everywhere"
        )
    extra = ("softcap", "query_segment_ids", "dropout_key")
    if implementation == "cudnn" and any(settings[name] is not None for name in extra):
        raise InputError(
            f'implementation="cudnn" must come without {", ".join(extra)}; they need '
            "implementation=None"
        )
