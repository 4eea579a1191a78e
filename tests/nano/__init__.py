"""The recipe of the tiny Phi-4-multimodal in data/nano: its tasks, its training, its test.

``python -m nano.train WORK`` from this directory trains it; see the README beside this file.
"""
