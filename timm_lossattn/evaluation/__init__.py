"""Measures: how well patches find the object (``metrics``), and how faithful a heat map is (``faithfulness``)."""
