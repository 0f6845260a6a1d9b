"""Measures: what patches find (``metrics``), and what any heat map is worth (``pointing``, ``localization``,
``faithfulness``, ``randomization``), one value an image (``per_image``), with intervals (``intervals``; of a share of
images ``proportion``).
"""
