// The explorer of measurements. Its data are one JSON block, #shvit-measurements, in the form of
// export/bench/records.py; everything is built inside #shvit-explorer. Names are only ever set as text.
// export/bench/explorer.py joins explorer_draw.js, explorer_devices.js, explorer_growth.js and this file to one function.

const data = JSON.parse(document.getElementById("shvit-measurements").textContent);
const root = document.getElementById("shvit-explorer");
const BEST = "best";
const ALL = null; // a device may have any name
const SHAPES = [
  "M-5,0a5,5 0 1,0 10,0a5,5 0 1,0 -10,0", "M-4.6,-4.6h9.2v9.2h-9.2z", "M0,-6.6L6.6,0L0,6.6L-6.6,0z",
  "M0,-6.2L6,4.6H-6z", "M0,6.2L6,-4.6H-6z", "M-2,-6h4v4h4v4h-4v4h-4v-4h-4v-4h4z",
  "M-6.2,0L4.6,-6V6z", "M6.2,0L-4.6,-6V6z", "M-5,-5.5H5L-5,5.5H5z", "M-6.5,-2.6h13v5.2h-13z",
  "M0,-7.0L1.7,-2.3L6.7,-2.2L2.8,0.9L4.1,5.7L0,2.9L-4.1,5.7L-2.8,0.9L-6.7,-2.2L-1.7,-2.3z",
  "M-6.4,-3.6L-3.6,-6.4L0,-2.8L3.6,-6.4L6.4,-3.6L2.8,0L6.4,3.6L3.6,6.4L0,2.8L-3.6,6.4L-6.4,3.6L-2.8,0z",
];

// --- measurements ---------------------------------------------------------------------------------------------

const results = data.results.filter((result) => result.latency_ms_p50 > 1e-6);
const rated = results.filter((result) => isNumber(result.top1));
const formOf = ({ runtime, precision }) => (runtime.endsWith(precision) ? runtime : `${runtime} ${precision}`);
const modelOf = (result) => `${result.model} @${sizeText(result.img_size)}`;
const isOurs = (result) => result.model.startsWith("shvit");
const forms = unique(results.map(formOf));
const devices = unique(results.map((result) => result.device));
const deviceName = (device) => device || (data.machine ? data.machine.processor : "this machine");
const onDevice = (result) => (devices.length > 1 ? ` on ${deviceName(result.device)}` : "");
const colorOf = (device) => `c${devices.indexOf(device) % 12}`;
const shapeOf = (result) => SHAPES[forms.indexOf(formOf(result)) % SHAPES.length];
const nameOf = (result) =>
  results.some((other) => other.model === result.model && modelOf(other) !== modelOf(result))
    ? modelOf(result) : result.model;
const firstOf = (result) =>
  results.find((other) => other.device === result.device && other.batch_size === result.batch_size);
/** Returns why there is no ratio: its interval is wide, or rounds are too few for one. */
const why = ({ ratio_low: low, ratio_high: high }) =>
  isNumber(low) && isNumber(high) && high - low < 0.1 * low ? "too few rounds to decide" : "too noisy to decide";
const ratioOf = (result) => {
  const ends = isNumber(result.ratio_low) ? `${number(result.ratio_low)}–${number(result.ratio_high)}` : null;
  if (!isNumber(result.ratio_to_first)) return why(result) + (ends ? ` (${ends})` : "");
  return `${number(result.ratio_to_first)}×` + (ends ? ` (${ends})` : "");
};
/** Returns whether the ratio is of processor times, because other programs had the core meanwhile. */
const byProcessor = (result) => result.ratio_basis === "processor time";

/** Returns the results that can be shown of a device, or of `ALL`. */
const ratedOn = (device) => rated.filter((result) => device === ALL || result.device === device);
/** Returns a form's points at a batch size, fastest first; for `BEST` each model's fastest form on each device. */
const choose = (device, form, batch) => {
  const chosen = new Map();
  for (const result of ratedOn(device).filter((each) => each.batch_size === batch)) {
    if (form !== BEST && formOf(result) !== form) continue;
    const key = JSON.stringify([result.device, modelOf(result)]);
    const known = chosen.get(key);
    if (!known || result.latency_ms_p50 < known.latency_ms_p50) chosen.set(key, result);
  }
  return [...chosen.values()].sort((a, b) => a.latency_ms_p50 - b.latency_ms_p50 || b.top1 - a.top1);
};
/** Returns those of `shown`, fastest first, that are more accurate than all faster ones. */
const frontOf = (shown) => {
  let highest = -Infinity;
  return shown.filter((result) => result.top1 > highest && ((highest = result.top1), true));
};
/** Returns the results grouped by device, as a front is one device's. */
const byDevice = (shown) => devices.map((device) => shown.filter((result) => result.device === device))
  .filter((group) => group.length);
const bestWithin = (shown, budget) => frontOf(shown).filter((result) => result.latency_ms_p50 <= budget).at(-1);

// --- choosing a model -----------------------------------------------------------------------------------------

const latencies = (shown) => (shown.length ? spread(shown.map((result) => result.latency_ms_p50), 1.12) : [1, 10]);
const [fastest, slowest] = latencies(rated);
const ratedDevices = unique(rated.map((result) => result.device));
const state = { device: ratedDevices.find(Boolean) ?? "", form: BEST, batch: null, budget: null, selected: null };
state.budget = +Math.sqrt(latencies(ratedOn(state.device)).reduce((a, b) => a * b)).toPrecision(2);
const parts = {};

function controls() {
  const toBudget = (position) => +(fastest * (slowest / fastest) ** (position / 1000)).toPrecision(3);
  parts.slider = h("input", {
    type: "range", id: "budget", min: 0, max: 1000, step: 1,
    oninput: () => setBudget(toBudget(+parts.slider.value), true),
  });
  parts.exact = h("input", {
    type: "number", id: "budget-ms", min: 0, step: "any", inputmode: "decimal",
    "aria-label": "latency budget in milliseconds per image",
    oninput: () => parts.exact.value > 0 && setBudget(+parts.exact.value, false),
  });
  parts.device = h("select", {
    id: "device", onchange: () => { state.device = ratedDevices[parts.device.value] ?? ALL; offer(); redraw(); },
  }, ...options([...ratedDevices.map((device, i) => [i, deviceName(device)]), ["all", "all devices side by side"]]));
  parts.device.value = String(ratedDevices.indexOf(state.device));
  parts.form = h("select", { id: "form", onchange: () => { state.form = parts.form.value; redraw(); } });
  parts.batch = h("select", { id: "batch", onchange: () => { state.batch = +parts.batch.value; redraw(); } });
  offer();
  return h("form", { class: "controls", onsubmit: (event) => event.preventDefault() },
    ratedDevices.length > 1 ? h("label", {}, "Device", parts.device) : null,
    h("label", {}, "Runs in", parts.form), h("label", {}, "Batch size", parts.batch),
    h("div", { class: "budget" },
      h("label", { for: "budget" }, "Latency budget per image"),
      h("div", {}, parts.slider, parts.exact, h("span", {}, "ms"))));
}

/** Offers the forms and batch sizes of the device; a choice is kept where possible. */
function offer() {
  const here = ratedOn(state.device);
  const available = unique(here.map(formOf));
  const sizes = unique(here.map((result) => result.batch_size)).sort((a, b) => a - b);
  if (!available.includes(state.form)) state.form = BEST;
  if (!sizes.includes(state.batch)) state.batch = sizes[0];
  parts.form.replaceChildren(...options([[BEST, "best form of each model"], ...available.map((form) => [form, form])]));
  parts.batch.replaceChildren(...options(sizes.map((size) => [size, String(size)])));
  parts.form.value = state.form;
  parts.batch.value = String(state.batch);
}

function setBudget(budget, fromSlider) {
  state.budget = budget;
  state.selected = null;
  if (fromSlider) parts.exact.value = String(budget);
  else {
    const position = (1000 * Math.log(budget / fastest)) / Math.log(slowest / fastest);
    parts.slider.value = String(Math.min(1000, Math.max(0, Math.round(position))));
  }
  parts.slider.setAttribute("aria-valuetext", `${short(budget)} ms per image`);
  mark();
}

function redraw() {
  state.selected = null;
  scatter();
}

function scatter() {
  const shown = choose(state.device, state.form, state.batch);
  const width = Math.max(260, parts.plot.clientWidth);
  const height = Math.round(Math.min(540, Math.max(320, width * 0.62)));
  const size = { left: 38, right: width - 10, top: 26, bottom: height - 44 };
  const accuracy = rated.map((result) => result.top1);
  const [low, high] = [Math.min(...accuracy) - 0.7, Math.max(...accuracy) + 0.7];
  const x = logarithmic(fastest, slowest, size.left, size.right);
  const y = linear(low, high, size.bottom, size.top);
  const fronts = byDevice(shown).map(frontOf);
  const line = (front) => front.reduce((path, { latency_ms_p50: ms, top1 }) =>
    path + (path ? `H${x(ms)}V${y(top1)}` : `M${x(ms)},${y(top1)}`), "");
  parts.scale = { x, y, size };
  parts.ghosts = svg("g", { class: "ghosts", "aria-hidden": "true" });
  parts.over = svg("rect", { class: "over", y: size.top, height: size.bottom - size.top });
  parts.limit = svg("line", { class: "limit", y1: size.top, y2: size.bottom });
  parts.points = shown.map((result) => ({ result, element: point(result, x, y) }));
  const chart = svg("svg", {
    width, height, viewBox: `0 0 ${width} ${height}`, role: "group", class: state.device === ALL ? "devices" : null,
    "aria-label": "Published top-1 accuracy against latency; each point is a model",
    onkeydown: (event) => { if (event.key === "Escape") { state.selected = null; mark(); } },
  },
  parts.over,
  frame(size, x, y, apart(decades(fastest, slowest), x, 34), steps(low, high),
    "ms per image, logarithmic", "ImageNet top-1, %"),
  ...fronts.map((front) => svg("path", { class: `front ${colorOf(front[0].device)}`, d: line(front) })),
  parts.limit, parts.ghosts,
  ...parts.points.map(({ element }) => element));
  parts.plot.replaceChildren(chart);
  parts.key.replaceChildren(...key());
  placeNames(fronts, size);
  mark();
}

function key() {
  const here = ratedOn(state.device);
  const all = state.device === ALL;
  const item = (mark, text) => h("li", {}, svg("svg", { width: 18, height: 14, viewBox: "-9 -7 18 14" }, mark), text);
  return [
    ...(all ? ratedDevices : []).map((device) =>
      h("li", {}, h("i", { class: `swatch ${colorOf(device)}` }), deviceName(device))),
    ...unique(here.map(formOf)).map((form) =>
      item(svg("path", { class: "mark", d: SHAPES[forms.indexOf(form) % SHAPES.length] }), form)),
    item(svg("path", { class: "front", d: "M-8,4H0V-4H8" }),
      `nothing${all ? " on that device" : ""} is faster and more accurate`),
    ...(here.every((result) => isNumber(result.ratio_to_first)) ? [] : [item(
      svg("path", { class: "mark hollow", d: SHAPES[0] }), "hollow: too noisy, or too few rounds, to compare")]),
  ];
}

/** Returns a result's runtime, and its device if points of several devices are shown. */
const placeOf = (result) => formOf(result) + (state.device === ALL ? onDevice(result) : "");

function point(result, x, y) {
  const select = () => { state.selected = result; mark(); };
  return svg("g", {
    class: `point ${colorOf(result.device)}${isOurs(result) ? " ours" : ""}`
      + `${isNumber(result.ratio_to_first) ? "" : " noisy"}`,
    transform: `translate(${x(result.latency_ms_p50)},${y(result.top1)})`,
    tabindex: 0, role: "button",
    "aria-label": `${nameOf(result)}, ${placeOf(result)}: ${percent(result.top1)} top-1, `
      + `${number(result.latency_ms_p50)} ms per image`,
    onfocus: select, onpointerenter: select, onclick: select,
  },
  svg("circle", { class: "reach", r: 14 }),
  svg("path", { class: "mark", d: shapeOf(result) }),
  svg("text", { class: "name" }, nameOf(result)));
}

/** Places names, ours and the fronts' first; a name without room is shown only when its point is chosen. */
function placeNames(fronts, size) {
  const inFront = (result) => fronts.some((front) => front.includes(result));
  const { x, y } = parts.scale;
  const at = (result) => [x(result.latency_ms_p50), y(result.top1)];
  const taken = parts.points.map(({ result }) => {
    const [left, top] = at(result);
    return { x: left - 6, y: top - 6, width: 12, height: 12 };
  });
  for (const front of fronts) {
    front.slice(1).forEach((result, i) => { // the line: across from the one before, then up
      const [[left, bottom], [right, top]] = [at(front[i]), at(result)];
      taken.push({ x: left, y: bottom - 1, width: right - left, height: 2 });
      taken.push({ x: right - 1, y: top, width: 2, height: bottom - top });
    });
  }
  const touches = (a, b) =>
    a.x < b.x + b.width && b.x < a.x + a.width && a.y < b.y + b.height && b.y < a.y + a.height;
  const rank = ({ result }) => (isOurs(result) ? 0 : inFront(result) ? 1 : 2);
  for (const { result, element } of [...parts.points].sort((a, b) => rank(a) - rank(b))) {
    const name = element.querySelector(".name");
    const [left, top] = at(result);
    const { width, height } = name.getBBox();
    const [east, west] = [[[12, 4]], [[-12 - width, 4], [-8 - width, -8]]]; // the front goes on to the east
    const places = [...(inFront(result) ? [...west, ...east] : [...east, ...west]),
      [-width / 2, -13], [-width / 2, 21], [8, -8], [8, 18], [-8 - width, 18]];
    const inside = places.filter(([dx]) => left + dx >= size.left && left + dx + width <= size.right + 6);
    const boxOf = ([dx, dy]) => ({ x: left + dx, y: top + dy - height + 4, width, height: height - 2 });
    const free = inside.find((place) => !taken.some((box) => touches(boxOf(place), box)));
    const [dx, dy] = free ?? inside[0] ?? places[0];
    name.setAttribute("x", dx);
    name.setAttribute("y", dy);
    if (free) taken.push(boxOf(free));
    else element.classList.add("crowded");
  }
}

/** Updates what the budget and the chosen point change, in place, so that the focus stays. */
function mark() {
  const shown = parts.points.map(({ result }) => result);
  const groups = byDevice(shown);
  const bests = groups.map((group) => bestWithin(group, state.budget));
  const chosen = state.selected ?? bests.find(Boolean) ?? shown[0];
  for (const { result, element } of parts.points) {
    element.classList.toggle("dim", result.latency_ms_p50 > state.budget);
    element.classList.toggle("best", bests.includes(result));
    element.classList.toggle("chosen", result === chosen);
    element.setAttribute("aria-pressed", String(result === chosen));
  }
  const { x, size } = parts.scale;
  const limit = Math.min(size.right, Math.max(size.left, x(state.budget)));
  fill(parts.limit, { x1: limit, x2: limit }, []);
  fill(parts.over, { x: limit, width: size.right - limit }, []);
  ghosts(chosen);
  const budget = h("b", {}, `${short(state.budget)}\u00a0ms`);
  const winner = (best, after) => [
    h("b", { class: "winner" }, nameOf(best)), after, h("span", {}, `${percent(best.top1)} top-1`), " in ",
    number(best.latency_ms_p50, "ms"), ", ", h("span", {}, `${formOf(best)}.`),
    isNumber(best.ratio_to_first) ? "" : h("small", {}, ` Against others: ${why(best)}.`)];
  const none = (group) => ["the fastest, ", h("b", {}, nameOf(group[0])),
    `, takes ${number(group[0].latency_ms_p50, "ms")}.`];
  if (groups.length > 1)
    parts.verdict.replaceChildren("Within ", budget, " per image, the most accurate is",
      ...groups.map((group, i) => h("span", { class: `line ${colorOf(group[0].device)}` },
        `on ${deviceName(group[0].device)}: `, ...(bests[i] ? winner(bests[i], ", ") : ["none: ", ...none(group)]))));
  else if (bests[0])
    parts.verdict.replaceChildren("Within ", budget, " per image, the most accurate is ", ...winner(bests[0], ": "));
  else if (shown.length) parts.verdict.replaceChildren("No model fits ", budget, " per image: ", ...none(shown));
  else parts.verdict.replaceChildren("Nothing with a published accuracy was measured so; choose another batch size.");
  parts.card.setAttribute("aria-live", state.selected ? "polite" : "off");
  parts.card.replaceChildren(...(chosen ? card(chosen) : []));
}

const othersOf = (result) => results.filter((other) =>
  modelOf(other) === modelOf(result) && other.batch_size === result.batch_size)
  .sort((a, b) => a.latency_ms_p50 - b.latency_ms_p50);

/** The same model in its other forms, on the line of its accuracy. */
function ghosts(chosen) {
  const { x, y } = parts.scale;
  if (!chosen) return;
  const others = othersOf(chosen).filter((other) => state.device === ALL || other.device === state.device)
    .map((other) => [x(other.latency_ms_p50), shapeOf(other)]);
  const at = others.map(([place]) => place);
  parts.ghosts.replaceChildren(
    svg("line", { x1: Math.min(...at), x2: Math.max(...at), y1: y(chosen.top1), y2: y(chosen.top1) }),
    ...others.map(([place, d]) => svg("path", { d, transform: `translate(${place},${y(chosen.top1)}) scale(.8)` })));
}

function card(result) {
  const first = firstOf(result);
  const others = othersOf(result);
  const longest = Math.max(...others.map((other) => other.latency_ms_p50));
  const rows = [
    ["top-1, published", percent(result.top1)],
    ["median", number(result.latency_ms_p50, "ms")],
    ["90th percentile", number(result.latency_ms_p90, "ms")],
    ["99th percentile", number(result.latency_ms_p99, "ms")],
    ["processor time", number(result.cpu_ms, "ms")],
    ...(byProcessor(result) ? [["core taken by other programs", number(result.preempted_percent, "% of the time")]] : []),
    ["multiply-adds", number(result.gmacs, "G")],
    ["of the machine's peak", number(result.percent_of_peak, "%")],
    ["load", number(result.load_ms, "ms")],
    ["first call", number(result.first_ms, "ms")],
    ["peak memory", number(result.peak_memory_mb, "MB")],
  ];
  return [
    h("h3", { class: isOurs(result) ? "ours" : null }, result.model),
    h("p", {}, `${formOf(result)}${onDevice(result)}, ${sizeText(result.img_size)} px, batch ${result.batch_size}, `
      + `${threads(result.threads)}; ${result.rounds} rounds of ${result.calls} calls`),
    h("dl", {}, ...rows.flatMap(([term, value]) => [h("dt", {}, term), h("dd", {}, value)])),
    first === result ? null : h("p", { class: "ratio" },
      ...(isNumber(result.ratio_to_first) ? [h("b", {}, ratioOf(result)), ` the ${byProcessor(result) ? "processor " : ""}time of `]
        : [h("b", {}, ratioOf(result)), " between this and "]), `${nameOf(first)}, ${formOf(first)}.`),
    others.length > 1 ? h("div", { class: "forms" }, h("h4", {}, "Its forms, ms per image"),
      ...byDevice(others).flatMap((group) => [
        devices.length > 1 ? h("h5", {}, deviceName(group[0].device)) : null,
        ...group.map((other) => {
          const bar = h("i", {});
          bar.style.width = `${(62 * other.latency_ms_p50) / longest}%`;
          return h("div", { class: other === result ? "this" : null }, h("span", {}, formOf(other)),
            h("span", { class: "bar" }, bar, number(other.latency_ms_p50)));
        })])) : null,
  ].filter(Boolean);
}

function chooser() {
  if (!rated.length)
    return section("Accuracy against latency",
      h("p", {}, "No model here has a published accuracy; the table has them."));
  const unrated = unique(results.filter((result) => !isNumber(result.top1)).map(nameOf));
  parts.verdict = h("p", { class: "verdict", "aria-live": "polite" });
  parts.plot = h("div", { class: "plot" });
  parts.card = h("aside", { class: "card", "aria-label": "Numbers of the chosen point" });
  parts.key = h("ul", { class: "key" });
  return h("section", { class: "chooser" }, controls(), parts.verdict,
    h("div", { class: "columns" },
      h("div", {}, parts.plot, parts.key),
      parts.card),
    h("p", { class: "note" }, "Latency is the median per image: a batch's time over its size. Accuracy is the "
      + "published one of the float32 weights, also for other precisions."
      + (unrated.length ? ` Without a published accuracy, only in the table: ${unrated.join(", ")}.` : "")));
}

// --- table ----------------------------------------------------------------------------------------------------

const fixed = (value) => (isNumber(value) ? value.toFixed(2) : "–");
const pixelsOf = ({ img_size: size }) => {
  const [height, width = height] = [size].flat();
  return height * width;
};
const COLUMNS = [
  ["model", (r) => r.model], ["runs in", formOf],
  ...(devices.length > 1 ? [["device", (r) => deviceName(r.device)]] : []),
  ["p50 ms", (r) => r.latency_ms_p50], ["batch", (r) => r.batch_size, String], ["top-1 %", (r) => r.top1, fixed],
  ["px", pixelsOf, (_, r) => sizeText(r.img_size)],
  ["p90 ms", (r) => r.latency_ms_p90], ["p99 ms", (r) => r.latency_ms_p99],
  ["ratio", (r) => r.ratio_to_first, (_, r) => ratioOf(r) + (byProcessor(r) ? " CPU" : "")], ["CPU ms", (r) => r.cpu_ms], ["GMACs", (r) => r.gmacs],
  ["% of peak", (r) => r.percent_of_peak], ["load ms", (r) => r.load_ms], ["first call ms", (r) => r.first_ms],
  ["memory MB", (r) => r.peak_memory_mb],
];

function table() {
  if (!results.length) return section("All results", h("p", {}, "Nothing was measured."));
  const body = h("tbody");
  const heads = COLUMNS.map(([title], index) => h("th", { scope: "col" },
    h("button", { type: "button", onclick: () => sort(index) }, title)));
  const filter = h("input", { type: "search", id: "filter", oninput: () => rows() });
  let order = { index: null, sign: 1 };
  const compare = (get) => (a, b) => {
    const [one, other] = [get(a) ?? null, get(b) ?? null];
    if (one === null || other === null) return (one === null) - (other === null);
    return order.sign * (typeof one === "string" ? one.localeCompare(other) : one - other);
  };
  function sort(index) {
    order = { index, sign: order.index === index ? -order.sign : 1 };
    for (const head of heads) head.removeAttribute("aria-sort");
    heads[index].setAttribute("aria-sort", order.sign > 0 ? "ascending" : "descending");
    rows();
  }
  function rows() {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    const shown = results.filter((result) => words.every((word) =>
      `${result.model} ${formOf(result)}${onDevice(result)}`.toLowerCase().includes(word)));
    if (order.index !== null) shown.sort(compare(COLUMNS[order.index][1]));
    body.replaceChildren(...shown.map((result) => h("tr", { class: isOurs(result) ? "ours" : null },
      ...COLUMNS.map(([, get, text], i) => {
        const value = get(result);
        const shownAs = text ? text(value, result) : typeof value === "string" ? value : number(value);
        const look = typeof value === "string" ? null : "figure";
        return i ? h("td", { class: look }, shownAs) : h("th", { scope: "row" }, shownAs);
      }))));
  }
  rows();
  const several = devices.length > 1;
  return section("All results",
    h("label", { class: "filter" }, several ? "Model, runtime or device" : "Model or runtime", filter),
    scroller("All results", h("table", { id: "results" }, h("thead", {}, h("tr", {}, ...heads)), body)),
    h("p", { class: "note" }, "The ratio is to the first case of the same "
      + `${several ? "device and " : ""}batch size, with its 95 % interval.`
      + (results.some(byProcessor) ? " CPU: a ratio of processor times, as other programs had the core meanwhile; the others, "
        + "and all latencies, are wall times." : "")));
}

// --- the page -------------------------------------------------------------------------------------------------

root.replaceChildren(...[
  h("p", { class: "lead" }, `Measured on ${listing(devices.map(deviceName)) || deviceName("")}: `
    + `${counted(unique(results.map(nameOf)).length, "model")}, ${counted(results.length, "result")}.`),
  chooser(),
  growth("batch_size", "Growth with the batch", "images in a batch", "batch", (value) => String(value)),
  growth("pixels", "Growth with resolution", "height × width", "pixels", side),
  layers(), numerics(data.checks), sustained(data.sustained), placed(data.placements), table(), described(data.devices),
  machine(data.machine),
].filter(Boolean));
if (rated.length) {
  resized.unshift(scatter);
  parts.exact.value = String(state.budget);
  parts.points = [];
}
let width = null;
const fit = () => {
  if (root.clientWidth === width) return;
  width = root.clientWidth;
  for (const draw of resized) draw();
};
fit();
if (rated.length) setBudget(state.budget, false);
new ResizeObserver(fit).observe(root);
