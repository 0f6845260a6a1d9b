"""What the entry points of this package share: default_cfgs, layer arguments, and timm's model builder."""
from collections.abc import Mapping
from functools import partial
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg

from .patch_classifier import PatchClassifier
from .patch_layers import CapsulePatchLayers, ConvPatchLayers
from .pretrained import verified_overlay

__all__ = [
    'CIFAR10_LABELS',
    'CIFAR100_LABELS',
    'NANO_CAPS',
    'NANO_CONV',
    'TINY_IMAGENET_LABELS',
    'TINY_IMAGENET_MINI_LABELS',
    'create_patch_classifier',
    'patch_model_cfg',
]

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CIFAR10_LABELS = ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')
CIFAR100_LABELS = (  # the Hub's uoft-cs/cifar100 calls the crab "cra"
    'apple', 'aquarium_fish', 'baby', 'bear', 'beaver', 'bed', 'bee', 'beetle', 'bicycle', 'bottle', 'bowl', 'boy',
    'bridge', 'bus', 'butterfly', 'camel', 'can', 'castle', 'caterpillar', 'cattle', 'chair', 'chimpanzee', 'clock',
    'cloud', 'cockroach', 'couch', 'crab', 'crocodile', 'cup', 'dinosaur', 'dolphin', 'elephant', 'flatfish',
    'forest', 'fox', 'girl', 'hamster', 'house', 'kangaroo', 'keyboard', 'lamp', 'lawn_mower', 'leopard', 'lion',
    'lizard', 'lobster', 'man', 'maple_tree', 'motorcycle', 'mountain', 'mouse', 'mushroom', 'oak_tree', 'orange',
    'orchid', 'otter', 'palm_tree', 'pear', 'pickup_truck', 'pine_tree', 'plain', 'plate', 'poppy', 'porcupine',
    'possum', 'rabbit', 'raccoon', 'ray', 'road', 'rocket', 'rose', 'sea', 'seal', 'shark', 'shrew', 'skunk',
    'skyscraper', 'snail', 'snake', 'spider', 'squirrel', 'streetcar', 'sunflower', 'sweet_pepper', 'table', 'tank',
    'telephone', 'television', 'tiger', 'tractor', 'train', 'trout', 'tulip', 'turtle', 'wardrobe', 'whale',
    'willow_tree', 'wolf', 'woman', 'worm')
TINY_IMAGENET_LABELS = (  # the first name of each of its synsets, in their order
    'goldfish', 'European fire salamander', 'bullfrog', 'tailed frog', 'American alligator', 'boa constrictor',
    'trilobite', 'scorpion', 'black widow', 'tarantula', 'centipede', 'goose', 'koala', 'jellyfish', 'brain coral',
    'snail', 'slug', 'sea slug', 'American lobster', 'spiny lobster', 'black stork', 'king penguin', 'albatross',
    'dugong', 'Chihuahua', 'Yorkshire terrier', 'golden retriever', 'Labrador retriever', 'German shepherd',
    'standard poodle', 'tabby', 'Persian cat', 'Egyptian cat', 'cougar', 'lion', 'brown bear', 'ladybug', 'fly', 'bee',
    'grasshopper', 'walking stick', 'cockroach', 'mantis', 'dragonfly', 'monarch', 'sulphur butterfly', 'sea cucumber',
    'guinea pig', 'hog', 'ox', 'bison', 'bighorn', 'gazelle', 'Arabian camel', 'orangutan', 'chimpanzee', 'baboon',
    'African elephant', 'lesser panda', 'abacus', 'academic gown', 'altar', 'apron', 'backpack', 'bannister',
    'barbershop', 'barn', 'barrel', 'basketball', 'bathtub', 'beach wagon', 'beacon', 'beaker', 'beer bottle',
    'bikini', 'binoculars', 'birdhouse', 'bow tie', 'brass', 'broom', 'bucket', 'bullet train', 'butcher shop',
    'candle', 'cannon', 'cardigan', 'cash machine', 'CD player', 'chain', 'chest', 'Christmas stocking',
    'cliff dwelling', 'computer keyboard', 'confectionery', 'convertible', 'crane', 'dam', 'desk', 'dining table',
    'drumstick', 'dumbbell', 'flagpole', 'fountain', 'freight car', 'frying pan', 'fur coat', 'gasmask', 'go-kart',
    'gondola', 'hourglass', 'iPod', 'jinrikisha', 'kimono', 'lampshade', 'lawn mower', 'lifeboat', 'limousine',
    'magnetic compass', 'maypole', 'military uniform', 'miniskirt', 'moving van', 'nail', 'neck brace', 'obelisk',
    'oboe', 'organ', 'parking meter', 'pay-phone', 'picket fence', 'pill bottle', 'plunger', 'pole', 'police van',
    'poncho', 'pop bottle', "potter's wheel", 'projectile', 'punching bag', 'reel', 'refrigerator', 'remote control',
    'rocking chair', 'rugby ball', 'sandal', 'school bus', 'scoreboard', 'sewing machine', 'snorkel', 'sock',
    'sombrero', 'space heater', 'spider web', 'sports car', 'steel arch bridge', 'stopwatch', 'sunglasses',
    'suspension bridge', 'swimming trunks', 'syringe', 'teapot', 'teddy', 'thatch', 'torch', 'tractor',
    'triumphal arch', 'trolleybus', 'turnstile', 'umbrella', 'vestment', 'viaduct', 'volleyball', 'water jug',
    'water tower', 'wok', 'wooden spoon', 'comic book', 'plate', 'guacamole', 'ice cream', 'ice lolly', 'pretzel',
    'mashed potato', 'cauliflower', 'bell pepper', 'mushroom', 'orange', 'lemon', 'banana', 'pomegranate', 'meat loaf',
    'pizza', 'potpie', 'espresso', 'alp', 'cliff', 'coral reef', 'lakeside', 'seashore', 'acorn')
TINY_IMAGENET_MINI_LABELS = (
    'goldfish', 'king penguin', 'ladybug', 'monarch', 'gazelle', 'lifeboat', 'trolleybus', 'umbrella', 'orange',
    'banana')

# an eighth of the widths; capsules keep their numbers and have 2 and 16 dimensions
NANO_CONV = partial(ConvPatchLayers, width=64)
NANO_CAPS = partial(CapsulePatchLayers, primary=(32, 2), secondary=(64, 16))


def patch_model_cfg(size: int = 32, **kwargs: Any) -> dict[str, Any]:
    """default_cfg for images of size × size pixels: CIFAR-10 (32), Tiny ImageNet (64), ImageNet (224)."""
    num_classes, pool_size, label_names = {
        32: (10, (6, 6), CIFAR10_LABELS), 64: (200, (6, 6), TINY_IMAGENET_LABELS), 224: (1000, (5, 5), None)}[size]
    return {
        'num_classes': num_classes, 'input_size': (3, size, size), 'pool_size': pool_size,
        'crop_pct': 1.0 if size < 224 else 0.875, 'interpolation': 'bicubic', 'fixed_input_size': False,
        'mean': CIFAR_MEAN if size == 32 else IMAGENET_DEFAULT_MEAN,
        'std': CIFAR_STD if size == 32 else IMAGENET_DEFAULT_STD,
        'first_conv': 'backbone.stem.conv', 'classifier': 'head.fc', 'license': 'apache-2.0',
        'label_names': label_names,
        'paper_name': 'Loss-based Attention for Interpreting Image-level Prediction of Convolutional Neural Networks',
        **kwargs,
    }


def create_patch_classifier(variant: str, pretrained: bool, num_stages: int, **kwargs: Any) -> PatchClassifier:
    """PatchClassifier, or its backbone with ``features_only=True``, through timm's model builder."""
    model = build_model_with_cfg(
        PatchClassifier,
        variant,
        pretrained,
        feature_cfg=dict(out_indices=tuple(range(num_stages)), feature_cls='getter'),
        **verified_overlay(variant, pretrained, kwargs),
    )
    return model if pretrained else without_labels(model, kwargs)


def without_labels(model: Any, kwargs: Mapping[str, Any]) -> Any:
    """A model without the registered class names, those of weights that are not loaded, or with the names given."""
    given = kwargs.get('pretrained_cfg') or {}  # a tag, or a whole cfg of the caller's or of a folder
    own = {} if isinstance(given, str) else given if isinstance(given, dict) else given.to_dict()
    labels = {**own, **(kwargs.get('pretrained_cfg_overlay') or {})}.get('label_names', ())
    model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, 'label_names': labels}
    return model
