"""The pieces of :mod:`krdistill.data.augment`.

``base`` is what an augmentation is; ``spatial`` moves and hides pixels; ``operations`` are the image operations as pure
functions; ``automatic`` draws from them; ``mixing`` is mixup.
"""
