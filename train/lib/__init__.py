"""What the scripts of train/ share: options, data, models, the training loop, checkpoints, records, pictures."""
from .extras import need

need('train', 'tqdm', 'yaml')  # every script has a bar or a YAML file
