// The part of TensorFlow's C API that we use, found in the TensorFlow that is loaded: nothing of TensorFlow is needed
// to build us, and no version of it is built in. Names and types are those of tensorflow/c/{ops,kernels,tf_tensor}.h,
// which TensorFlow keeps compatible; those of the second table are from tensorflow/c/eager/c_api{,_experimental}.h.
#pragma once
#include <cstddef>
#include <cstdint>

namespace fourfold {

struct TFE_Context;
struct TFE_Executor;
struct TFE_Op;
struct TFE_TensorHandle;
struct TF_Buffer {
    const void* data;
    size_t length;
    void (*deallocate)(void*, size_t);
};
struct TF_KernelBuilder;
struct TF_OpDefinitionBuilder;
struct TF_OpKernelConstruction;
struct TF_OpKernelContext;
struct TF_ShapeHandle;
struct TF_ShapeInferenceContext;
struct TF_Status;
struct TF_Tensor;

enum TF_Code : int { TF_OK = 0, TF_INVALID_ARGUMENT = 3, TF_RESOURCE_EXHAUSTED = 8, TF_INTERNAL = 13 };
enum TF_DataType : int { TF_FLOAT = 1, TF_UINT8 = 4, TF_BFLOAT16 = 14, TF_HALF = 19 };

using TF_Create = void*(TF_OpKernelConstruction*);
using TF_Compute = void(void* self, TF_OpKernelContext*);
using TF_Delete = void(void* self);
using TF_InferShapes = void(TF_ShapeInferenceContext*, TF_Status*);

// name, result, parameters
#define FOURFOLD_TENSORFLOW_FUNCTIONS(F)                                                                      \
    F(TF_NewStatus, TF_Status*, (void))                                                                       \
    F(TF_DeleteStatus, void, (TF_Status*))                                                                    \
    F(TF_SetStatus, void, (TF_Status*, TF_Code, const char*))                                                 \
    F(TF_GetCode, TF_Code, (const TF_Status*))                                                                \
    F(TF_Message, const char*, (const TF_Status*))                                                            \
    F(TF_NewOpDefinitionBuilder, TF_OpDefinitionBuilder*, (const char* name))                                 \
    F(TF_OpDefinitionBuilderAddAttr, void, (TF_OpDefinitionBuilder*, const char*))                            \
    F(TF_OpDefinitionBuilderAddInput, void, (TF_OpDefinitionBuilder*, const char*))                           \
    F(TF_OpDefinitionBuilderAddOutput, void, (TF_OpDefinitionBuilder*, const char*))                          \
    F(TF_OpDefinitionBuilderSetShapeInferenceFunction, void, (TF_OpDefinitionBuilder*, TF_InferShapes*))      \
    F(TF_RegisterOpDefinition, void, (TF_OpDefinitionBuilder*, TF_Status*))                                   \
    F(TF_NewShapeHandle, TF_ShapeHandle*, (void))                                                             \
    F(TF_DeleteShapeHandle, void, (TF_ShapeHandle*))                                                          \
    F(TF_ShapeInferenceContextGetInput, void, (TF_ShapeInferenceContext*, int, TF_ShapeHandle*, TF_Status*))  \
    F(TF_ShapeInferenceContextSetOutput, void, (TF_ShapeInferenceContext*, int, TF_ShapeHandle*, TF_Status*)) \
    F(TF_ShapeInferenceContextSetUnknownShape, void, (TF_ShapeInferenceContext*, TF_Status*))                 \
    F(TF_ShapeInferenceContextRankKnown, int, (TF_ShapeInferenceContext*, TF_ShapeHandle*))                   \
    F(TF_ShapeInferenceContextWithRankAtLeast, void,                                                          \
      (TF_ShapeInferenceContext*, TF_ShapeHandle*, int64_t, TF_ShapeHandle*, TF_Status*))                     \
    F(TF_ShapeInferenceContextSubshape, void,                                                                 \
      (TF_ShapeInferenceContext*, TF_ShapeHandle*, int64_t begin, int64_t end, TF_ShapeHandle*, TF_Status*))  \
    F(TF_ShapeInferenceContextConcatenateShapes, void,                                                        \
      (TF_ShapeInferenceContext*, TF_ShapeHandle*, TF_ShapeHandle*, TF_ShapeHandle*, TF_Status*))             \
    F(TF_NewKernelBuilder, TF_KernelBuilder*,                                                                 \
      (const char* op, const char* device, TF_Create*, TF_Compute*, TF_Delete*))                              \
    F(TF_RegisterKernelBuilder, void, (const char* name, TF_KernelBuilder*, TF_Status*))                      \
    F(TF_OpKernelContext_Failure, void, (TF_OpKernelContext*, TF_Status*))                                    \
    F(TF_GetSerializedConfigProto, void, (TF_OpKernelContext*, TF_Buffer*, TF_Status*))                       \
    F(TF_NewBuffer, TF_Buffer*, (void))                                                                       \
    F(TF_DeleteBuffer, void, (TF_Buffer*))                                                                    \
    F(TF_GetInput, void, (TF_OpKernelContext*, int, TF_Tensor**, TF_Status*))                                 \
    F(TF_AllocateOutput, TF_Tensor*,                                                                          \
      (TF_OpKernelContext*, int, TF_DataType, const int64_t* dims, int n_dims, size_t bytes, TF_Status*))     \
    F(TF_DeleteTensor, void, (TF_Tensor*))                                                                    \
    F(TF_TensorType, TF_DataType, (const TF_Tensor*))                                                         \
    F(TF_NumDims, int, (const TF_Tensor*))                                                                    \
    F(TF_Dim, int64_t, (const TF_Tensor*, int))                                                               \
    F(TF_TensorData, void*, (const TF_Tensor*))

// Of eager execution, which an op does not need.
#define FOURFOLD_TENSORFLOW_EAGER_FUNCTIONS(F)                                                     \
    F(TF_AllocateTensor, TF_Tensor*, (TF_DataType, const int64_t* dims, int n_dims, size_t bytes)) \
    F(TFE_ContextGetExecutorForThread, TFE_Executor*, (TFE_Context*))                              \
    F(TFE_ExecutorIsAsync, bool, (TFE_Executor*))                                                  \
    F(TFE_DeleteExecutor, void, (TFE_Executor*))                                                   \
    F(TFE_NewOp, TFE_Op*, (TFE_Context*, const char* name, TF_Status*))                            \
    F(TFE_OpReset, void, (TFE_Op*, const char* name, const char* device, TF_Status*))              \
    F(TFE_DeleteOp, void, (TFE_Op*))                                                               \
    F(TFE_OpAddInput, void, (TFE_Op*, TFE_TensorHandle*, TF_Status*))                              \
    F(TFE_OpSetAttrType, void, (TFE_Op*, const char* name, TF_DataType))                           \
    F(TFE_Execute, void, (TFE_Op*, TFE_TensorHandle * *results, int* n_results, TF_Status*))       \
    F(TFE_NewTensorHandle, TFE_TensorHandle*, (const TF_Tensor*, TF_Status*))                      \
    F(TFE_DeleteTensorHandle, void, (TFE_TensorHandle*))                                           \
    F(TFE_TensorHandleDataType, TF_DataType, (TFE_TensorHandle*))                                  \
    F(TFE_TensorHandleNumDims, int, (TFE_TensorHandle*, TF_Status*))                               \
    F(TFE_TensorHandleDim, int64_t, (TFE_TensorHandle*, int, TF_Status*))                          \
    F(TFE_TensorHandleNumElements, int64_t, (TFE_TensorHandle*, TF_Status*))                       \
    F(TFE_TensorHandleDeviceName, const char*, (TFE_TensorHandle*, TF_Status*))                    \
    F(TFE_TensorHandleDevicePointer, void*, (TFE_TensorHandle*, TF_Status*))

// A pointer to each, under its own name.
struct TensorFlow {
#define FOURFOLD_POINTER(name, result, parameters) result(*name) parameters;
    FOURFOLD_TENSORFLOW_FUNCTIONS(FOURFOLD_POINTER)
#undef FOURFOLD_POINTER
};
struct TensorFlowEager {
#define FOURFOLD_POINTER(name, result, parameters) result(*name) parameters;
    FOURFOLD_TENSORFLOW_EAGER_FUNCTIONS(FOURFOLD_POINTER)
#undef FOURFOLD_POINTER
};

}  // namespace fourfold
