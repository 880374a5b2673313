// One backend of ONNX Runtime in a thread of its own, which opens, checks and times one model at a time when told to.
// It is told by phone.js: {id, task, …}, and answers {id, …} or {id, error}.

const WARM_UP = 3; // calls that are not timed
const [FEWEST, MOST] = [3, 20000]; // calls that are

let ort = null;
let provider = null;
let model = null; // {session, input, output}

const tensorOf = ({ data, dims, type }) => new ort.Tensor(type, data, dims);

async function run(feed) {
  const { [model.output]: output } = await model.session.run({ [model.input]: feed });
  return output.data;
}

const TASKS = {
  /** Makes ONNX Runtime ready, with so many threads, for good. */
  async start({ module, loader, binary, threads, options }) {
    ort = await import(URL.createObjectURL(module));
    ort.env.logLevel = "error";
    Object.assign(ort.env.wasm, {
      numThreads: threads, wasmBinary: await binary.arrayBuffer(), wasmPaths: { mjs: URL.createObjectURL(loader) },
    });
    provider = options;
    return {};
  },

  /** From a file's bytes to ready. */
  async open({ file, input, output }) {
    await TASKS.close();
    const bytes = new Uint8Array(await file.arrayBuffer());
    const start = performance.now();
    const session = await ort.InferenceSession.create(bytes, { executionProviders: [provider] });
    model = { session, input, output };
    return { ms: performance.now() - start };
  },

  /** The answers to some inputs, one after the other, and the milliseconds of each. */
  async answer({ inputs }) {
    const answers = [];
    const calls = [];
    for (const input of inputs) {
      const start = performance.now();
      answers.push(Float32Array.from(await run(tensorOf(input))));
      calls.push(performance.now() - start);
    }
    return { answers, calls };
  },

  /** The milliseconds of each call of so many seconds, warm. */
  async time({ input, seconds }) {
    const feed = tensorOf(input);
    for (let i = 0; i < WARM_UP; i += 1) await run(feed);
    const calls = [];
    const end = performance.now() + 1000 * seconds;
    while (calls.length < FEWEST || (performance.now() < end && calls.length < MOST)) {
      const start = performance.now();
      await run(feed);
      calls.push(performance.now() - start);
    }
    return { calls };
  },

  async close() {
    const { session } = model ?? {};
    model = null;
    await session?.release();
    return {};
  },
};

self.onmessage = async ({ data: { id, task, ...told } }) => {
  try {
    self.postMessage({ id, ...(await TASKS[task](told)) });
  } catch (error) {
    self.postMessage({ id, error: String(error?.message ?? error) });
  }
};
