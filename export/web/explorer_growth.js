// Growth with batch and resolution, and time by kind of layer, in the explorer.

// --- growth with the batch and with pixels --------------------------------------------------------------------

function growth(over, title, axis, name, label) {
  const sweeps = data.scaling.filter((sweep) => sweep.over === over && sweep.values.length);
  if (!sweeps.length) return null;
  const models = unique(sweeps.map((sweep) => sweep.model));
  const runtimes = unique(sweeps.map((sweep) => sweep.runtime));
  const look = (sweep) => `series c${models.indexOf(sweep.model) % 12} dash${runtimes.indexOf(sweep.runtime) % 4}`;
  const chart = (key, yTitle) => {
    const holder = h("div", { class: "plot" });
    resized.push(() => {
      const width = Math.max(260, holder.clientWidth);
      const height = 290;
      const size = { left: 44, right: width - 12, top: 26, bottom: height - 44 };
      const xs = unique(sweeps.flatMap((sweep) => sweep.values)).sort((a, b) => a - b);
      const positive = sweeps.flatMap((sweep) => sweep[key]).filter((value) => value > 0);
      if (!positive.length) return;
      const [low, high] = spread(positive, 1.15);
      const x = logarithmic(...spread(xs, 1.1), size.left, size.right);
      const y = logarithmic(low, high, size.bottom, size.top);
      holder.replaceChildren(svg("svg", {
        width, height, viewBox: `0 0 ${width} ${height}`, role: "img",
        "aria-label": `${yTitle} against ${axis}; the numbers are in the list below`,
      },
      frame(size, x, y, apart(xs, x, 36), apart(decades(low, high), y, 22), `${axis}, logarithmic`, yTitle, label),
      ...sweeps.map((sweep) => {
        const pairs = sweep.values.map((value, i) => [value, sweep[key][i]]).filter(([, value]) => value > 0);
        return svg("g", { class: look(sweep) },
          svg("path", { d: pairs.map(([a, b], i) => `${i ? "L" : "M"}${x(a)},${y(b)}`).join("") }),
          ...pairs.map(([a, b]) => svg("circle", { cx: x(a), cy: y(b), r: 3.5 },
            svg("title", {}, `${sweep.model} ${sweep.runtime}, ${label(a)}: ${number(b)}`))));
      })));
    });
    return holder;
  };
  const power = (value) => h("span", {}, `∝ ${name}`, h("sup", {}, signed(value)));
  return section(title,
    h("div", { class: "pair" }, chart("latency_ms", "ms per image, logarithmic"),
      chart("peak_memory_mb", "peak memory, MB, logarithmic")),
    h("ul", { class: "key lines" }, ...sweeps.map((sweep) => h("li", {},
      svg("svg", { width: 26, height: 10, viewBox: "0 0 26 10", class: look(sweep), "aria-hidden": "true" },
        svg("path", { d: "M0,5H26" })),
      h("span", {}, `${sweep.model} ${sweep.runtime}: `,
        h("span", { class: "power" }, "time ", power(sweep.exponent), ","), " ",
        h("span", { class: "power" }, "memory ", power(sweep.memory_exponent)))))),
    h("details", {}, h("summary", {}, "The numbers"), scroller(`${title}: numbers`, h("table", {},
      h("thead", {}, h("tr", {}, ...["model", "runtime", axis, "ms per image", "memory, MB"].map((text) =>
        h("th", { scope: "col" }, text)))),
      h("tbody", {}, ...sweeps.flatMap((sweep) => sweep.values.map((value, i) => h("tr", {},
        ...[sweep.model, sweep.runtime, label(value), number(sweep.latency_ms[i]), number(sweep.peak_memory_mb[i])]
          .map((text) => h("td", {}, text))))))))));
}

const side = (pixels) => (Number.isInteger(Math.sqrt(pixels)) ? `${Math.sqrt(pixels)}²` : short(pixels));

// --- kinds of layers ------------------------------------------------------------------------------------------

function layers() {
  const bars = new Map();
  const total = new Map();
  for (const part of data.layers) {
    const key = JSON.stringify([part.model, part.runtime, part.batch_size]);
    bars.set(key, [...(bars.get(key) ?? []), part]);
    total.set(part.kind, (total.get(part.kind) ?? 0) + part.percent);
  }
  if (!bars.size) return null;
  const kinds = [...total.keys()].sort((a, b) => total.get(b) - total.get(a));
  const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);
  const longest = Math.max(...[...bars.values()].map((all) => sum(all.map((part) => part.ms))));
  const holder = h("div", { class: "layers" });
  const show = (inShares, batch) => holder.replaceChildren(...[...bars.values()]
    .filter(([first]) => batch === "all" || first.batch_size === +batch).map((all) => {
      const ms = sum(all.map((part) => part.ms));
      const sorted = [...all].sort((a, b) => kinds.indexOf(a.kind) - kinds.indexOf(b.kind));
      const { model, runtime, batch_size: size } = all[0];
      const bar = h("div", {
        class: "stack", role: "img",
        "aria-label": sorted.map((part) => `${part.kind} ${part.percent.toFixed(0)} %`).join(", "),
      }, ...sorted.map((part) => {
        const length = inShares ? (100 * part.ms) / ms : (100 * part.ms) / longest;
        const piece = h("span", {
          class: `c${kinds.indexOf(part.kind) % 12}`,
          title: `${part.kind}: ${number(part.ms)} ms, ${part.percent.toFixed(1)} %`,
        }, (length * holder.clientWidth) / 100 > 36 ? `${part.percent.toFixed(0)} %` : "");
        piece.style.width = `${length}%`;
        return piece;
      }));
      return h("div", {}, h("div", { class: "caption" }, h("b", {}, model),
        ` ${runtime}${batch === "all" ? `, batch ${size}` : ""}`, h("span", {}, number(ms, "ms"))), bar);
    }));
  const sizes = unique(data.layers.map((part) => part.batch_size)).sort((a, b) => a - b);
  const shares = h("select", { id: "layers-as" },
    ...options([["ms", "milliseconds"], ["share", "share of the whole"]]));
  const batch = h("select", { id: "layers-batch" },
    ...options([...sizes.map((size) => [size, String(size)]), ["all", "all"]]));
  const update = () => show(shares.value === "share", batch.value);
  for (const select of [shares, batch]) select.addEventListener("change", update);
  resized.push(update);
  return section("Where the time goes",
    h("form", { class: "controls", onsubmit: (event) => event.preventDefault() },
      h("label", {}, "Length of a bar", shares), h("label", {}, "Batch size", batch)),
    h("ul", { class: "key" }, ...kinds.map((kind, i) => h("li", {}, h("i", { class: `swatch c${i % 12}` }), kind))),
    holder, h("p", { class: "note" }, "By kind of layer, from the runtimes' own profilers; per image."));
}
