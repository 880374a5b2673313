// Devices in the explorer: whether their outputs match, whether they sustain their speed, and what they are.

const NOT_REPORTED = "the browser does not report it";
const THROTTLES = 1.1; // slower by less is noise

/** "a, b and c" */
const listing = (names) => [names.slice(0, -1).join(", "), ...names.slice(-1)].filter(Boolean).join(" and ");

function numerics(checks) {
  if (!checks.length) return null;
  const failed = checks.filter((check) => check.error);
  const several = unique(checks.map((check) => check.device)).length > 1;
  const fixed = (digits) => (value) => (isNumber(value) ? value.toFixed(digits) : "–");
  const scientific = (value) => (value ? value.toExponential(1) : value === 0 ? "0" : "–");
  const columns = [
    ["model", (check) => check.model], ["outcome", (check) => (check.error ? "failed" : check.incomplete ? "passed, cut short" : "passed")], ["runs in", formOf],
    ...(several ? [["device", (check) => deviceName(check.device)]] : []),
    ["images", (check) => String(check.images)],
    ["largest relative error", (check) => scientific(check.max_rel_error)],
    ["SNR dB", (check) => (check.max_rel_error === 0 ? "∞" : fixed(1)(check.snr_db))],
    ["same top-1 %", (check) => fixed(1)(check.top1_agreement)],
    ...(checks.some((check) => check.error || check.incomplete)
      ? [["what went wrong", (check) => check.error || check.incomplete || "–"]] : []),
  ];
  const looks = { outcome: "outcome", "what went wrong": "why" };
  return section(`Numerics on the device${several ? "s" : ""}`,
    h("p", { class: "lead" }, failed.length
      ? h("b", { class: "bad" }, `${failed.length} of ${counted(checks.length, "file")} failed and `
        + `${failed.length === 1 ? "was" : "were"} not timed.`)
      : checks.length === 1 ? "The file's outputs match." : `The outputs of all ${checks.length} files match.`),
    scroller("Numerics", h("table", { id: "checks" },
      h("thead", {}, h("tr", {}, ...columns.map(([title]) => h("th", { scope: "col" }, title)))),
      h("tbody", {}, ...checks.map((check) => h("tr", { class: check.error ? "failed" : null },
        ...columns.map(([title, get], i) => (i ? h("td", { class: looks[title] }, get(check))
          : h("th", { scope: "row" }, get(check))))))))),
    h("p", { class: "note" }, "Before anything was timed, outputs for images were compared with those of the same "
      + "file in ONNX Runtime on the machine that exported it."));
}

const slowdownOf = ({ slowdown }) => {
  if (!isNumber(slowdown)) return "too short to tell";
  const times = `${slowdown.toFixed(2)}×`;
  if (slowdown > THROTTLES) return `throttles: ${times} slower at the end`;
  return slowdown < 1 / THROTTLES ? `gets faster: ${times} the time at the end` : `sustains its speed: ${times}`;
};

/** Returns a small chart for each model; latency begins at 0, so that slopes are not exaggerated. */
function sustained(runs) {
  if (!runs.length) return null;
  const places = unique(runs.map((run) => run.device));
  return section("Sustained", h("div", { class: "pair runs" }, ...runs.map((run) => {
    const words = slowdownOf(run);
    const name = `${formOf(run)} on ${deviceName(run.device)}`;
    const holder = h("div", { class: "plot" });
    const pairs = run.latency_ms.map((ms, i) => [i + 1, ms]).filter(([, ms]) => isNumber(ms));
    if (pairs.length) resized.push(() => {
      const width = Math.max(220, holder.clientWidth);
      const height = 190;
      const size = { left: 40, right: width - 10, top: 26, bottom: height - 44 };
      const [seconds, highest] = [run.latency_ms.length, 1.15 * Math.max(...pairs.map(([, ms]) => ms))];
      const x = linear(0, seconds, size.left, size.right);
      const y = linear(0, highest, size.bottom, size.top);
      holder.replaceChildren(svg("svg", {
        width, height, viewBox: `0 0 ${width} ${height}`, role: "img",
        "aria-label": `${run.model}, ${name}, ms per image over ${counted(seconds, "second")}: ${words}`,
      },
      frame(size, x, y, apart(steps(0, seconds), x, 30), apart(steps(0, highest), y, 18), "seconds", "ms per image"),
      svg("g", { class: `series c${places.indexOf(run.device) % 12}` },
        svg("path", { d: pairs.map(([a, b], i) => `${i ? "L" : "M"}${x(a)},${y(b)}`).join("") }),
        ...[pairs[0], pairs.at(-1)].map(([a, b]) => svg("circle", { cx: x(a), cy: y(b), r: 3.5 })))));
    });
    return h("div", {}, h("div", { class: "caption" }, h("b", {}, run.model), ` ${name}`),
      h("div", { class: run.slowdown > THROTTLES ? "words bad" : "words" }, words), holder);
  })), h("p", { class: "note" }, "One model after the other, run without a pause: the median of each second. The "
    + "slowdown is the median of the last fifth over that of the first fifth."));
}

/** Returns Core ML's compute plans. */
function placed(placements) {
  if (!placements.length) return null;
  const units = unique(placements.flatMap((each) => Object.keys(each.operations)));
  const share = (each, unit) => (isNumber(each.cost_percent[unit]) ? `, ${each.cost_percent[unit].toFixed(0)} %` : "");
  return section("Core ML's plan", scroller("Core ML's plan", h("table", { id: "placements" },
    h("thead", {}, h("tr", {}, ...["model", "compute units", ...units].map((title) =>
      h("th", { scope: "col" }, title)))),
    h("tbody", {}, ...placements.map((each) => h("tr", {}, h("th", { scope: "row" }, each.model),
      h("td", {}, each.compute_units),
      ...units.map((unit) => h("td", { class: "figure" }, `${each.operations[unit] ?? 0}${share(each, unit)}`))))))),
  h("p", { class: "note" }, "Operations on each processor, and their share of the cost that Core ML estimates."));
}

function described(devices) {
  if (!devices.length) return null;
  return section("Devices", h("div", { class: "pair" }, ...devices.map((device) => {
    const rows = [
      ["browser", device.browser || NOT_REPORTED],
      ["cores", device.cores > 0 ? String(device.cores) : NOT_REPORTED],
      ["memory", isNumber(device.memory_gb) ? `${short(device.memory_gb)}\u00a0GB` : NOT_REPORTED],
      ["GPU", device.gpu || "no WebGPU"],
      ["runtime", device.runtime],
      ...Object.entries(device.missing).map(([backend, reason]) => [`no ${backend}`, reason]),
    ];
    return h("div", {}, h("h3", {}, deviceName(device.name)), h("dl", { class: "machine" },
      ...rows.flatMap(([term, value]) => [h("dt", {}, term), h("dd", {}, value)])));
  })));
}

function machine(described) {
  if (!described) return null;
  const listed = (pairs, unit = "") => Object.entries(pairs).map(([key, value]) =>
    `${key} ${isNumber(value) ? short(value) : value}${unit}`).join(", ") || "–";
  const rows = [
    ["processor", `${described.processor}, ${counted(described.cores, "core")}`],
    ["instruction sets", described.instructions.join(", ") || "–"],
    ["frequency", described.frequency],
    ["peak arithmetic", `${listed(described.peak_gflops, " Gflop/s")} (${threads(described.threads)})`],
    ["memory bandwidth", number(described.bandwidth_gb_per_s, "GB/s")],
    ["versions", listed(described.versions)],
  ];
  return section("Machine", h("dl", { class: "machine" },
    ...rows.flatMap(([term, value]) => [h("dt", {}, term), h("dd", {}, value)])));
}
