// Numbers and axes of the explorer.

// --- numbers --------------------------------------------------------------------------------------------------

const unique = (values) => [...new Set(values)];
/** Returns a number without trailing zeros. */
const short = (value) => (Math.abs(value) >= 1000 ? number(value) : String(+value.toPrecision(3)));
const threads = (count) => counted(count, "thread");
const percent = (value) => (isNumber(value) ? `${value.toFixed(2)}\u00a0%` : "–");
const signed = (value) => (isNumber(value) ? value.toFixed(2).replace("-", "−") : "–");
const options = (pairs) => pairs.map(([value, text]) => h("option", { value }, text));
/** Functions that draw the charts again at another width. */
const resized = [];

// --- axes -----------------------------------------------------------------------------------------------------

/** Returns 1, 2, 5, 10, … within the ends. */
const decades = (low, high) => {
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1)
    for (const lead of [1, 2, 5]) ticks.push(lead * 10 ** power);
  return ticks.filter((value) => value >= low && value <= high);
};
const steps = (low, high) => {
  const power = 10 ** Math.floor(Math.log10((high - low) / 8));
  const step = [1, 2, 5, 10].map((lead) => lead * power).find((each) => (high - low) / each <= 8);
  const first = Math.ceil(low / step);
  return Array.from({ length: Math.floor(high / step) - first + 1 }, (_, i) => +((first + i) * step).toFixed(6));
};
const logarithmic = (low, high, from, to) => (value) =>
  from + ((to - from) * Math.log(value / low)) / Math.log(high / low || Math.E);
const linear = (low, high, from, to) => (value) => from + ((to - from) * (value - low)) / (high - low || 1);
const spread = (values, factor) => [Math.min(...values) / factor, Math.max(...values) * factor];
/** Returns ticks that are at least `gap` apart. */
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
