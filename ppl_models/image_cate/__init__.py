"""Image-based treatment effects: who gains from an intervention, read off images."""

from ppl_models.image_cate.rate import rate

__all__ = ["rate"]
