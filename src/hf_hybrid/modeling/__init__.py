"""Models: a folder per architecture, beside the modules that all of them share."""

# The base classes of Transformers import its Auto tables, which register the modules of this package as soon as they
# are loaded. Loading them first keeps that from happening in the middle of one of our modules.
import transformers.models.auto.modeling_auto  # noqa: F401
