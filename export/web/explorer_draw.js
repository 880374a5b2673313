// Elements, numbers and axes, of which the explorer is built. Names are only ever set as text.

// --- elements -------------------------------------------------------------------------------------------------

const fill = (element, attributes, children) => {
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(key, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
};
const h = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
const unique = (values) => [...new Set(values)];
const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

/** Three digits, or all before the point; a dash for what was not measured. */
const number = (value, unit = "") => {
  if (!isNumber(value)) return "–";
  const text = Math.abs(value) >= 99.95 ? Math.round(value).toLocaleString("en-GB") : value.toPrecision(3);
  return unit ? `${text}\u00a0${unit}` : text;
};
/** Without zeros at the end: a round number that nobody measured. */
const short = (value) => (Math.abs(value) >= 1000 ? number(value) : String(+value.toPrecision(3)));
const counted = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;
const threads = (count) => counted(count, "thread");
const percent = (value) => (isNumber(value) ? `${value.toFixed(2)}\u00a0%` : "–");
const signed = (value) => (isNumber(value) ? value.toFixed(2).replace("-", "−") : "–");
const options = (pairs) => pairs.map(([value, text]) => h("option", { value }, text));
const section = (title, ...children) => h("section", {}, h("h2", {}, title), ...children);
const scroller = (label, table) =>
  h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": label }, table);
/** Charts, to be drawn anew at another width. */
const resized = [];

// --- axes -----------------------------------------------------------------------------------------------------

/** 1, 2, 5, 10, … within the ends. */
const decades = (low, high) => {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1)
    for (const lead of [1, 2, 5]) found.push(lead * 10 ** power);
  return found.filter((value) => value >= low && value <= high);
};
const steps = (low, high) => {
  const step = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20].find((each) => (high - low) / each <= 8) ?? 50;
  const first = Math.ceil(low / step);
  return Array.from({ length: Math.floor(high / step) - first + 1 }, (_, i) => +((first + i) * step).toFixed(6));
};
const logarithmic = (low, high, from, to) => (value) =>
  from + ((to - from) * Math.log(value / low)) / Math.log(high / low || Math.E);
const linear = (low, high, from, to) => (value) => from + ((to - from) * (value - low)) / (high - low || 1);
const spread = (values, factor) => [Math.min(...values) / factor, Math.max(...values) * factor];
/** Ticks that are at least `gap` apart. */
const apart = (ticks, scale, gap) => {
  let last = -Infinity;
  return ticks.filter((tick) => Math.abs(scale(tick) - last) >= gap && ((last = scale(tick)), true));
};

const frame = (size, x, y, xs, ys, xTitle, yTitle, label = short) => {
  const { left, right, top, bottom } = size;
  return svg("g", { class: "axes", "aria-hidden": "true" },
    ...xs.map((tick) => svg("g", {},
      svg("line", { x1: x(tick), x2: x(tick), y1: top, y2: bottom }),
      svg("text", { x: x(tick), y: bottom + 17, "text-anchor": "middle" }, label(tick)))),
    ...ys.map((tick) => svg("g", {},
      svg("line", { x1: left, x2: right, y1: y(tick), y2: y(tick) }),
      svg("text", { x: left - 7, y: y(tick) + 4, "text-anchor": "end" }, short(tick)))),
    svg("text", { class: "title", x: right, y: bottom + 36, "text-anchor": "end" }, xTitle),
    svg("text", { class: "title", x: 2, y: 13 }, yTitle));
};
