"""Heads and adapters: small networks on the features of a tap, their objectives, folders and cards."""

from typing import TYPE_CHECKING

from guidance.utils.lazy import lazy_names

if TYPE_CHECKING:
    from guidance.heads.adapter import load_adapter as load_adapter
    from guidance.heads.config import HeadConfig as HeadConfig
    from guidance.heads.networks import HEADS as HEADS
    from guidance.heads.networks import Head as Head
    from guidance.heads.networks import build_head as build_head
    from guidance.heads.networks import check_fits as check_fits
    from guidance.heads.networks import load_head as load_head
    from guidance.heads.networks import save_head as save_head

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
