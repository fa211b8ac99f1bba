"Video in, objects out, futures out: slot models for video."
__version__ = "0.1.0"
__all__ = ['from_pretrained']

def from_pretrained(folder_or_name, device='cpu'):
    "A trained video model in evaluation mode: a folder written by `save_pretrained` or by training, or the name of a shipped model."
    from .models.savi import SAVi # torch is only loaded when it is needed
    return SAVi.from_pretrained(folder_or_name, device)
