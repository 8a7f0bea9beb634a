"""SubjectBooth: DreamBooth inside ComfyUI, from three to five photos to images of the subject in one graph."""

try:
    # Outside ComfyUI (for example when a test runner collects this folder) there is nothing to register.
    import comfy_api.latest  # noqa: F401
except ImportError:
    pass
else:
    from .nodes import comfy_entrypoint

    WEB_DIRECTORY = "./js"
    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
