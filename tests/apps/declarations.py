"""Declarations of what the code of docs/start/app.md uses of libraries whose headers or classes no package brings here.

They have names, types and numbers alone. Those of LiteRT's C API are as in litert/c/*.h of google-ai-edge/LiteRT
(Apache-2.0), version 2.2.0 and August 2026: if they are wrong, the C++ program fails. Those of LiteRT's, ExecuTorch's
and ONNX Runtime's classes are as in their sources of 2026, Android's as we know them. Kotlin code is only compiled
with them: no test finds out if they are wrong.
"""

LITERT = {
    "litert_common.h": """
#pragma once
#include <stddef.h>
#include <stdint.h>
typedef class LiteRtCompiledModelT* LiteRtCompiledModel;
typedef class LiteRtEnvironmentT* LiteRtEnvironment;
typedef class LiteRtModelT* LiteRtModel;
typedef struct LiteRtOptionsT* LiteRtOptions;
typedef class LiteRtTensorBufferT* LiteRtTensorBuffer;
typedef class LiteRtTensorBufferRequirementsT* LiteRtTensorBufferRequirements;
typedef enum { kLiteRtStatusOk = 0, kLiteRtStatusErrorShapeInferenceFailed = 5001 } LiteRtStatus;
typedef enum { kLiteRtHwAcceleratorCpu = 1 } LiteRtHwAccelerators;
typedef enum { kLiteRtTensorBufferLockModeRead = 0, kLiteRtTensorBufferLockModeWrite = 1 } LiteRtTensorBufferLockMode;
typedef int LiteRtHwAcceleratorSet;
typedef size_t LiteRtParamIndex;
""",
    "litert_layout.h": """
#pragma once
#include "litert/c/litert_common.h"
typedef struct {
  unsigned int rank : 7;
  unsigned int has_strides : 1;
  int32_t dimensions[8];
  uint32_t strides[8];
} LiteRtLayout;
static_assert(sizeof(LiteRtLayout) == 68);
""",
    "litert_model_types.h": """
#pragma once
#include "litert/c/litert_layout.h"
typedef enum { kLiteRtElementTypeFloat32 = 1, kLiteRtElementTypeUInt8 = 3 } LiteRtElementType;
typedef struct {
  LiteRtElementType element_type;
  LiteRtLayout layout;
} LiteRtRankedTensorType;
static_assert(sizeof(LiteRtRankedTensorType) == 72);
""",
    "litert_environment.h": """
#pragma once
#include "litert/c/litert_common.h"
typedef struct LiteRtEnvOption LiteRtEnvOption;
extern "C" {
LiteRtStatus LiteRtCreateEnvironment(int num_options, const LiteRtEnvOption* options, LiteRtEnvironment* environment);
void LiteRtDestroyEnvironment(LiteRtEnvironment environment);
}
""",
    "litert_model.h": """
#pragma once
#include "litert/c/litert_common.h"
extern "C" {
LiteRtStatus LiteRtCreateModelFromFile(LiteRtEnvironment environment, const char* filename, LiteRtModel* model);
void LiteRtDestroyModel(LiteRtModel model);
}
""",
    "litert_options.h": """
#pragma once
#include "litert/c/litert_common.h"
extern "C" {
LiteRtStatus LiteRtCreateOptions(LiteRtOptions* options);
LiteRtStatus LiteRtSetOptionsHardwareAccelerators(LiteRtOptions options, LiteRtHwAcceleratorSet hardware_accelerators);
void LiteRtDestroyOptions(LiteRtOptions options);
}
""",
    "litert_tensor_buffer.h": """
#pragma once
#include "litert/c/litert_model_types.h"
extern "C" {
LiteRtStatus LiteRtCreateManagedTensorBufferFromRequirements(
    LiteRtEnvironment env, const LiteRtRankedTensorType* tensor_type, LiteRtTensorBufferRequirements requirements,
    LiteRtTensorBuffer* buffer);
LiteRtStatus LiteRtLockTensorBuffer(
    LiteRtTensorBuffer tensor_buffer, void** host_mem_addr, LiteRtTensorBufferLockMode lock_mode);
LiteRtStatus LiteRtUnlockTensorBuffer(LiteRtTensorBuffer buffer);
void LiteRtDestroyTensorBuffer(LiteRtTensorBuffer buffer);
}
""",
    "litert_compiled_model.h": """
#pragma once
#include "litert/c/litert_layout.h"
extern "C" {
LiteRtStatus LiteRtCreateCompiledModel(
    LiteRtEnvironment environment, LiteRtModel model, LiteRtOptions compilation_options,
    LiteRtCompiledModel* compiled_model);
LiteRtStatus LiteRtGetCompiledModelInputBufferRequirements(
    LiteRtCompiledModel compiled_model, LiteRtParamIndex signature_index, LiteRtParamIndex input_index,
    LiteRtTensorBufferRequirements* buffer_requirements);
LiteRtStatus LiteRtGetCompiledModelOutputBufferRequirements(
    LiteRtCompiledModel compiled_model, LiteRtParamIndex signature_index, LiteRtParamIndex output_index,
    LiteRtTensorBufferRequirements* buffer_requirements);
LiteRtStatus LiteRtRunCompiledModel(
    LiteRtCompiledModel compiled_model, LiteRtParamIndex signature_index, size_t num_input_buffers,
    LiteRtTensorBuffer* input_buffers, size_t num_output_buffers, LiteRtTensorBuffer* output_buffers);
void LiteRtDestroyCompiledModel(LiteRtCompiledModel compiled_model);
}
""",
}
"""LiteRT's headers, below litert/c."""

JAVA = {
    "android/content/Context.java": """
package android.content;
public abstract class Context {
    public abstract android.content.res.AssetManager getAssets();
    public abstract java.io.File getFilesDir();
}
""",
    "android/content/res/AssetManager.java": """
package android.content.res;
public final class AssetManager implements AutoCloseable {
    public native java.io.InputStream open(String fileName) throws java.io.IOException;
    public native void close();
}
""",
    "android/graphics/Bitmap.java": """
package android.graphics;
public final class Bitmap {
    public native int getWidth();
    public native int getHeight();
    public native void getPixels(int[] pixels, int offset, int stride, int x, int y, int width, int height);
    public static native Bitmap createScaledBitmap(Bitmap src, int dstWidth, int dstHeight, boolean filter);
}
""",
    "org/json/JSONException.java": """
package org.json;
public class JSONException extends Exception {}
""",
    "org/json/JSONObject.java": """
package org.json;
public class JSONObject {
    public JSONObject(String json) throws JSONException {}
    public native JSONObject getJSONObject(String name) throws JSONException;
    public native boolean getBoolean(String name) throws JSONException;
    public native double getDouble(String name) throws JSONException;
    public native int getInt(String name) throws JSONException;
    public native String getString(String name) throws JSONException;
    public native JSONArray optJSONArray(String name);
}
""",
    "org/json/JSONArray.java": """
package org.json;
public class JSONArray {
    public native int getInt(int index) throws JSONException;
}
""",
    "org/tensorflow/lite/InterpreterApi.java": """
package org.tensorflow.lite;
public interface InterpreterApi extends AutoCloseable {
    class Options {
        public Options setNumThreads(int numThreads) { return this; }
    }
    void run(Object input, Object output);
    void close();
}
""",
    "org/tensorflow/lite/Interpreter.java": """
package org.tensorflow.lite;
public final class Interpreter implements InterpreterApi {
    public static class Options extends InterpreterApi.Options {
        public Options() {}
        public Options setNumThreads(int numThreads) { return this; }
    }
    public Interpreter(java.nio.ByteBuffer byteBuffer, Options options) {}
    public native void run(Object input, Object output);
    public native void close();
}
""",
    "ai/onnxruntime/OrtException.java": """
package ai.onnxruntime;
public class OrtException extends Exception {}
""",
    "ai/onnxruntime/OnnxValue.java": """
package ai.onnxruntime;
public interface OnnxValue extends AutoCloseable {
    Object getValue() throws OrtException;
    void close();
}
""",
    "ai/onnxruntime/OnnxTensorLike.java": """
package ai.onnxruntime;
public abstract class OnnxTensorLike implements OnnxValue {}
""",
    "ai/onnxruntime/OnnxTensor.java": """
package ai.onnxruntime;
public class OnnxTensor extends OnnxTensorLike {
    public static native OnnxTensor createTensor(
        OrtEnvironment env, java.nio.ByteBuffer data, long[] shape, OnnxJavaType type) throws OrtException;
    public native java.nio.FloatBuffer getFloatBuffer();
    public native Object getValue() throws OrtException;
    public native void close();
}
""",
    "ai/onnxruntime/OnnxJavaType.java": """
package ai.onnxruntime;
public enum OnnxJavaType { FLOAT, DOUBLE, INT8, INT16, INT32, INT64, BOOL, STRING, UINT8, FLOAT16, BFLOAT16, UNKNOWN }
""",
    "ai/onnxruntime/OrtEnvironment.java": """
package ai.onnxruntime;
public class OrtEnvironment implements AutoCloseable {
    public static native OrtEnvironment getEnvironment();
    public native OrtSession createSession(byte[] modelArray, OrtSession.SessionOptions options) throws OrtException;
    public native void close();
}
""",
    "ai/onnxruntime/OrtSession.java": """
package ai.onnxruntime;
import java.util.Map;
import java.util.Optional;
public class OrtSession implements AutoCloseable {
    public static class SessionOptions implements AutoCloseable {
        public native void close();
    }
    public static class Result implements AutoCloseable, Iterable<Map.Entry<String, OnnxValue>> {
        public native java.util.Iterator<Map.Entry<String, OnnxValue>> iterator();
        public native OnnxValue get(int index);
        public native Optional<OnnxValue> get(String key);
        public native void close();
    }
    public native Result run(Map<String, ? extends OnnxTensorLike> inputs) throws OrtException;
    public native void close() throws OrtException;
}
""",
}
"""Classes of Android, LiteRT and ONNX Runtime, which are written in Java."""

KOTLIN = {
    "Executorch.kt": """
package org.pytorch.executorch
import java.io.Closeable
import java.nio.ByteBuffer
abstract class Tensor internal constructor() {
    open val dataAsFloatArray: FloatArray get() = error("only compiled")
    companion object {
        @JvmStatic fun fromBlobUnsigned(data: ByteArray, shape: LongArray): Tensor = error("only compiled")
        @JvmStatic fun fromBlobUnsigned(data: ByteBuffer, shape: LongArray): Tensor = error("only compiled")
    }
}
class EValue private constructor() {
    fun toTensor(): Tensor = error("only compiled")
    companion object {
        @JvmStatic fun from(tensor: Tensor): EValue = error("only compiled")
        @JvmStatic fun from(value: Boolean): EValue = error("only compiled")
        @JvmStatic fun from(value: Long): EValue = error("only compiled")
        @JvmStatic fun from(value: Double): EValue = error("only compiled")
        @JvmStatic fun from(value: String): EValue = error("only compiled")
    }
}
open class Module private constructor() : Closeable {
    open fun forward(vararg inputs: EValue): Array<EValue> = error("only compiled")
    override fun close() = error("only compiled")
    companion object {
        @JvmStatic @JvmOverloads fun load(modelPath: String?, loadMode: Int = 0, numThreads: Int = 0): Module =
            error("only compiled")
    }
}
""",
}
"""ExecuTorch's classes, which are written in Kotlin."""
