// Elements of a page, and numbers for people, shared by both pages. Names are only ever set as text.

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
const section = (title, ...children) => h("section", {}, h("h2", {}, title), ...children);
const scroller = (label, table) =>
  h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": label }, table);
const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

/** Returns three digits, or all before the point; a dash for a value that was not measured. */
const number = (value, unit = "") => {
  if (!isNumber(value)) return "–";
  const text = Math.abs(value) >= 99.95 ? Math.round(value).toLocaleString("en-GB") : value.toPrecision(3);
  return unit ? `${text}\u00a0${unit}` : text;
};
/** Returns the size of a model's images, which is one number for a square, or [height, width]: 224, or 224x640. */
const sizeText = (size) => [size].flat().join("x");
const counted = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

export { counted, fill, h, isNumber, number, scroller, section, sizeText, svg };
