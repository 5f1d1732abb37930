"""Networks that weigh their patches: what cannot be evaluated is refused before any work."""

from __future__ import annotations

from flows.preflight_truth import check_truth
from tasks.importance.masks import has_masks
from tasks.importance.networks import load_network
from tasks.importance.stage import REMEDY
from tasks.predict import names_of_classes
from tasks.sources import open_source
from tasks.study import Study, labels_are_classes
from tasks.training.pictures import check_labels, listed
from xai_core.errors import UsageError
from xai_core.models import Classifier


def check_networks(study: Study) -> None:
    """Builds every network of a study, and looks at all labels and, where there are some, at the masks.

    Raises:
        UsageError: a file that is missing, is none of a trained IA, EA or PA, is named twice or has no importance;
            pictures without a label that the network has a logit for; or masks that do not fit their pictures.
    """
    for position, network in enumerate(study.networks):
        try:
            model = load_network(network)
            _check_classes(study, model)
        except UsageError as error:
            raise UsageError(f"importance.networks.{position}: {error}") from None
    if study.networks and has_masks(study.config) and study.config.dataset.kind != "demo":
        first = load_network(study.networks[0])
        check_truth(study, names_of_classes(study.config.dataset, first, labels_are_classes=True))


def _check_classes(study: Study, model: Classifier) -> None:
    dataset = study.config.dataset
    names = open_source(dataset).class_names
    if names is not None and not labels_are_classes(dataset, model.num_classes):
        raise UsageError(
            f"expected a network of the pictures' {len(names)} classes ({', '.join(names[:3])}, ...), got one of "
            f"{model.num_classes}; {REMEDY}, or set dataset.classes to a CSV (index, folder, name)"
        )
    check_labels(listed(study.listing, dataset.limit), model.num_classes, "dataset", REMEDY)
