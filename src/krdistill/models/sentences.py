"""Small networks for sentences: a bag of n-grams, and a convolution over words. They take bytes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backbone import Backbone
from .hashing import char_hashes, lower, pair_hashes, place_powers, spread, word_hashes


class NGrams(nn.Module):
    r"""A sentence as the sum of the vectors of its words, pairs of words and runs of characters.

    .. math:: x = \frac{1}{\sqrt{n}} \sum_{g=1}^{n} E[b(g)]

    Args:
        buckets: rows of the table E; n-grams share them by their hash (:mod:`krdistill.models.hashing`).
        dim: numbers per row.
        chars: lengths of the runs of bytes.
    """

    powers: Tensor

    def __init__(self, buckets: int, dim: int, chars: Sequence[int]) -> None:
        super().__init__()
        self.buckets, self.chars = buckets, tuple(chars)
        self.register_buffer("powers", place_powers(), persistent=False)
        self.table = nn.Parameter(torch.randn(buckets, dim) * dim**-0.5)

    def forward(self, text: Tensor) -> Tensor:
        """Bytes ``(B, L)``, zeros behind the sentence, to ``(B, dim)``."""
        codes = lower(text)
        words, there = word_hashes(codes, self.powers)
        found = [(words, there), (pair_hashes(words), there[:, 1:])]
        found += [char_hashes(codes, n) for n in self.chars]
        buckets = torch.cat([spread(h, 1_000_003 * salt, self.buckets) for salt, (h, _) in enumerate(found)], 1)
        weight = torch.cat([mask for _, mask in found], 1).to(self.table.dtype)
        rows = F.embedding(buckets, self.table)
        return torch.einsum("bnd,bn->bd", rows, weight) / weight.sum(1, keepdim=True).clamp_min(1).sqrt()


class NGramNet(Backbone):
    """A bag of hashed n-grams, normalised, then hidden layers with ReLU.

    Args:
        buckets: of the hash table.
        dim: of its vectors.
        hidden: width of every hidden layer, at least one.
        chars: lengths of the runs of bytes that count beside words and pairs of words.
        num_classes: K.

    Source: Joulin, Grave, Bojanowski, Mikolov, "Bag of Tricks for Efficient Text Classification", EACL 2017,
    arXiv 1607.01759; the hashing trick: Weinberger et al., "Feature Hashing for Large Scale Multitask Learning", ICML
    2009, arXiv 0902.2206.
    Deviation: hidden layers and batch normalisation between the bag and the classifier.
    """

    def __init__(
        self, *, buckets: int, dim: int, hidden: Sequence[int], num_classes: int, chars: Sequence[int] = (3, 4)
    ) -> None:
        stages = [nn.Sequential(nn.Linear(i, o), nn.ReLU(inplace=True)) for i, o in pairwise((dim, *hidden))]
        stem = nn.Sequential(NGrams(buckets, dim, chars), nn.BatchNorm1d(dim))
        super().__init__(stem, stages, hidden, in_channels=1, num_classes=num_classes)

    def forward_maps(self, x: Tensor) -> tuple[Tensor, ...]:
        """The hidden layers of bytes ``(B, L)``, each ``(B, hidden[i], 1, 1)``."""
        flat, maps = self.stem(x), []
        for stage in self.stages:
            flat = stage(flat)
            maps.append(flat[:, :, None, None])
        return tuple(maps)


class Words(nn.Module):
    """A sentence as the vectors of its words, one after the other.

    Args:
        buckets: rows of the table; words share them by their hash.
        dim: numbers per row.
    """

    powers: Tensor

    def __init__(self, buckets: int, dim: int) -> None:
        super().__init__()
        self.buckets = buckets
        self.register_buffer("powers", place_powers(), persistent=False)
        self.table = nn.Parameter(torch.randn(buckets, dim) * dim**-0.5)

    def forward(self, text: Tensor) -> Tensor:
        """Bytes ``(B, L)`` to ``(B, dim, W)``, zeros where there is no word; the last is none."""
        words, there = (F.pad(t, (0, 1)) for t in word_hashes(lower(text), self.powers))
        rows = F.embedding(spread(words, 0, self.buckets), self.table) * there.to(self.table.dtype).unsqueeze(2)
        return rows.transpose(1, 2)


class TextCNN(Backbone):
    """Convolutions of several widths over the words of a sentence, each followed by its maximum over the sentence.

    Args:
        buckets: of the hash table of words.
        dim: of its vectors.
        width: channels of every convolution.
        windows: how many words each convolution sees.
        num_classes: K.

    Source: Kim, "Convolutional Neural Networks for Sentence Classification", EMNLP 2014, arXiv 1408.5882.
    Deviation: hashed words in place of a vocabulary, batch normalisation in place of dropout.
    """

    def __init__(
        self, *, buckets: int, dim: int, width: int, num_classes: int, windows: Sequence[int] = (1, 2, 3)
    ) -> None:
        super().__init__(
            Words(buckets, dim), [], [width * len(windows)], in_channels=1, num_classes=num_classes
        )  # fmt: skip
        convolutions = [nn.Conv1d(dim, width, n, padding=n - 1) for n in windows]
        self.convolutions = nn.ModuleList(convolutions)
        self.norm = nn.BatchNorm1d(width * len(windows))
        for layer in convolutions:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward_maps(self, x: Tensor) -> tuple[Tensor, ...]:
        """The maxima of all convolutions over bytes ``(B, L)``, after normalisation and ReLU: ``(B, D, 1, 1)``."""
        words = self.stem(x)
        found = torch.cat([layer(words).amax(2) for layer in self.convolutions], 1)
        return (F.relu(self.norm(found))[:, :, None, None],)
