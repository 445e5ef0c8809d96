"""The networks a task may name in `net_model`. Kept apart from their code, so that admission needs no torch."""

#: Built by `handlers.detection.networks`; a test holds the two lists together.
NETWORKS = ("MobileNet", "MobileNetV3", "VGG16", "ResNet50", "FCOS")
