"""DLSA: the label space divided into more balanced clusters before it is classified, on frozen features.

``losses.py`` has what a flow is fitted by, ``clusters.py`` what is counted in a division, ``flow.py`` the flow and
``head.py`` the classifier that is made of it. The flow is zuko's (``pip install 'krdistill[dlsa]'``).

Source: Xu et al., "Constructing Balance from Imbalance for Long-tailed Image Recognition", ECCV 2022, arXiv 2208.02567.
"""

from .head import DLSAHead, fit_dlsa

__all__ = ["DLSAHead", "fit_dlsa"]
