"""From a model and images to what decided: preprocessing, one forward pass, evidence, pictures."""
from .explain import explain, held_of, patch_model
from .explanation import Explanation
from .geometry import patches_to_pixels, square_box
from .labels import class_labels
from .preprocessing import Preprocessed, Preprocessing, input_config, open_image, preprocess

__all__ = [
    'Explanation', 'Preprocessed', 'Preprocessing', 'class_labels', 'explain', 'held_of', 'input_config',
    'open_image', 'patch_model', 'patches_to_pixels', 'preprocess', 'square_box',
]
