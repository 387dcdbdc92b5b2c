"""Families that no description covers, exported by tracing the model that transformers has.

loading       the checkpoint as a model of transformers; what no trace can help is refused
placeholders  operators that stand for attention and experts while the model is traced
probing       what a trace does not show: how far each attention sees, and that nothing else
              carries anything from one token to another
tracing       one torch.export of the whole model
norms         RMS norms in a trace, each of which is one operator in the graphs
gates         where its gates are, and what crosses them
rules         which routing rule a gate has, by trying
experts       what the experts compute, by trying, and where their weights are
aten          operators of torch → ONNX
graphs        the trace as segments, or as the fused graph
frontend      all of it, as the exporter wants it
names         how a traced bundle says that it is one, for those who need no torch to know
reference     transformers beside a traced bundle, for the verification
"""
