"""The metadata that exported files carry in their header, which UIs read."""

from __future__ import annotations

from datetime import UTC, datetime

from finetune.export.base import Adapter
from finetune.families.registry import FAMILIES

SPECIFIED = {"title", "resolution", "date", "trigger_phrase"}  # these have a field of their own in modelspec


def adapter_metadata(adapter: Adapter, about: dict[str, str], v_prediction: bool) -> dict[str, str]:
    """`ss_*` (Forge, A1111, sdnext), `modelspec.*` 1.0.1 and `finetune_*` strings.

    `about`: title, resolution ("512x512"), trigger_phrase, and any other facts about the run.
    """
    labels = FAMILIES[adapter.family].naming.labels
    kohya = {
        "ss_base_model_version": (v_prediction and labels.v_kohya) or labels.kohya,
        "ss_v2": str(labels.v2),
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(adapter.rank),
        "ss_network_alpha": str(adapter.alpha),
        "ss_output_name": about["title"],
    }
    return kohya | checkpoint_metadata(adapter.family, about, v_prediction, kind="/lora")


def checkpoint_metadata(family: str, about: dict[str, str], v_prediction: bool, kind: str = "") -> dict[str, str]:
    """`modelspec.*` and `finetune_*` strings; empty values are left out."""
    labels = FAMILIES[family].naming.labels
    architecture = (v_prediction and labels.v_architecture) or labels.architecture
    spec = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{architecture}{kind}",
        "implementation": labels.implementation,
        "title": about["title"],
        "resolution": about["resolution"],
        "date": about.get("date", written_date(datetime.now(UTC))),
        "trigger_phrase": about["trigger_phrase"],
        "prediction_type": "v" if v_prediction else labels.prediction,
    }
    own = {f"finetune_{key}": about[key] for key in about.keys() - SPECIFIED}
    return {f"modelspec.{key}": value for key, value in spec.items() if value} | own


def written_date(moment: datetime) -> str:
    """The date in modelspec's format; `moment` is in UTC."""
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
