"""Networks by name, and the wrappers that make any network usable. Listing them imports no torch."""

from __future__ import annotations

from .registry import ModelInfo, create_model, list_models, model_info

__all__ = ["ModelInfo", "create_model", "list_models", "model_info"]
