"""From a student to the device: an ONNX file, checked against PyTorch, that answers with ONNX Runtime and NumPy alone.

`pip install 'krdistill[train,onnx]'`, then `python examples/device.py`; the second half needs `krdistill[runtime]`
alone. Small settings; they are not a paper's.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from krdistill import Distiller, load_data
from krdistill.deploy import DeviceModel, entries, predict

data = load_data("digits", profile="exp", imbalance_factor=20)
distiller = Distiller(
    teacher="mlp128", student="mlp32", recipe="krdistill", train={"epochs": 15, "augmentation": "crop-only"}
)
distiller.fit(data)

with TemporaryDirectory() as place:
    file = Path(place) / "student.onnx"
    checked = distiller.export(file)
    print(checked["sentence"])

    # On the device. Images go in as they are, uint8 (N, H, W, C); normalisation and class names are in the file.
    model = DeviceModel(file)
    images, labels = data.test.images.numpy(), data.test.labels.numpy()
    probabilities = model(images)
    said = probabilities.argmax(1)
    recall = [(said[labels == k] == k).mean() for k in np.unique(labels)]

    # Or files of any size and colour, one at a time, in their order.
    Image.fromarray(images[0, :, :, 0]).resize((100, 120)).save(Path(place) / "photo.png")
    for answer in predict(model, entries([str(Path(place) / "photo.png")]), top=2):
        print(f"photo.png, a {labels[0]}: {answer.classes}, {[round(float(p), 3) for p in answer.probabilities]}")
print(f"student: balanced accuracy {np.mean(recall):.4f}")
