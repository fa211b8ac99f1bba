"Video in, objects out, futures out: slot models for video."
__version__ = "0.1.0"
__all__ = ['from_pretrained']

HOMES = dict(AutoEncoder='models.autoencoder', SAVi='models.savi', DVAE='models.dvae', STEVE='models.token_decoder', SlotFormer='models.slotformer', PSB='models.psb', TokenPSB='models.token_psb', ConvS5='models.convs5', SlotS5='models.slot_s5',
             ConvLSTM='models.convlstm', FrameTransformer='models.frame_transformer', VideoViT='models.video_vit', RunLengthPSB='models.run_length_slots', RunLengthSAVi='models.run_length_slots', MemorySlots='models.memory_slots',
             PoseChannels='training.dynamics')

def from_pretrained(folder_or_name, device='cpu'):
    "A trained model in evaluation mode, of the class that it was saved with: a folder written by `save_pretrained` or by training, or the name of a shipped model."
    import importlib
    from .layers.weights import CheckpointError, model_folder, read_about # torch is only loaded when it is needed
    folder = model_folder(folder_or_name)
    name = read_about(folder)['class']
    if name not in HOMES: raise CheckpointError(f"{folder} holds a {name}, which is no model of slotnb: load it with {name}.from_pretrained. Those of slotnb are {', '.join(HOMES)}")
    return getattr(importlib.import_module(f'{__name__}.{HOMES[name]}'), name).from_pretrained(folder, device)
