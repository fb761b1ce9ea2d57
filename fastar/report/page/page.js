"use strict";
// Values under the pointer, or under the arrow keys, of every figure; figures are readable without.
const short = value => String(Number(value.toPrecision(6)));
const near = (list, distance) => list.reduce((best, _, i) => distance(list[i]) < distance(list[best]) ? i : best, 0);

function curves({box: [left, top, width, height], x: [first, last], y: [low, high], log, name, curves, each}) {
  const steps = [...new Set(curves.flatMap(one => one.x))].sort((a, b) => a - b);
  const across = x => left + width * (x - first) / (last - first);
  const down = y => top + height * (high - (log ? Math.log10(y) : y)) / (high - low);
  return {
    size: [steps.length, 1],
    at: (x, y) => [near(steps, one => Math.abs(across(one) - x)), 0, y],
    cursor: i => `M${across(steps[i])} ${top}v${height}`,
    lines(i, _, y) {
      const here = across(steps[i]), said = [`${name}: ${short(steps[i])}`];
      for (const one of curves) {
        const n = near(one.x, x => Math.abs(across(x) - here));
        if (one.x.length > 1 && Math.abs(across(one.x[n]) - here) > 6) continue;
        said.push(`${one.name}: ${short(one.y[n])}` + (one.spread.length ? ` ± ${short(one.spread[n])}` : ""));
      }
      const there = y === undefined ? [] : each.filter(one => one.x.includes(steps[i]));
      const value = one => one.y[one.x.indexOf(steps[i])];
      const one = there[near(there, one => Math.abs(down(value(one)) - y))];
      if (one && Math.abs(down(value(one)) - y) < 10) said.push(`${one.name}: ${short(value(one))}`);
      return said;
    },
  };
}

function matrix({cells: [left, top, wide, tall], rows, columns, values}) {
  const within = (n, count) => Math.max(0, Math.min(count - 1, Math.floor(n)));
  return {
    size: [columns.length, rows.length],
    at: (x, y) => [within((x - left) / wide, columns.length), within((y - top) / tall, rows.length)],
    cursor: (i, j) => `M${left + i * wide} ${top + j * tall}h${wide}v${tall}h${-wide}z`,
    lines: (i, j) => [`${rows[j]}, ${columns[i]}: ${values[j][i] === null ? "no value" : short(values[j][i])}`],
  };
}

for (const figure of document.querySelectorAll("figure")) {
  const data = JSON.parse(figure.querySelector("script").textContent), plot = data.cells ? matrix(data) : curves(data);
  const svg = figure.querySelector("svg"), title = svg.querySelector("title"), tip = figure.querySelector("output");
  svg.setAttribute("aria-label", `${title.textContent}; arrow keys say its values`);
  title.remove();  // or it would cover the values
  let place = null;
  const show = (next, right) => {
    place = next;
    svg.querySelector(".cursor").setAttribute("d", place ? plot.cursor(...place) : "");
    tip.replaceChildren(...(place ? plot.lines(...place) : []).map(text => {
      const line = document.createElement("div");
      line.textContent = text;
      return line;
    }));
    tip.classList.toggle("right", Boolean(right));
  };
  const point = event => {
    const shown = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / shown.width;
    const x = event.clientX - shown.left;
    show(plot.at(x * scale, (event.clientY - shown.top) * scale), x < shown.width / 2);
  };
  svg.addEventListener("pointermove", point);
  svg.addEventListener("pointerdown", point);
  svg.addEventListener("pointerleave", event => event.pointerType === "touch" || show(null));  // a finger is lifted
  svg.addEventListener("blur", () => show(null));
  svg.addEventListener("keydown", event => {
    const step = {ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1]}[event.key];
    if (event.key === "Escape") show(null);
    if (!step) return;
    event.preventDefault();
    const wrap = n => ((place ? place[n] + step[n] : 0) + plot.size[n]) % plot.size[n];
    show([wrap(0), wrap(1)], place && place[0] < plot.size[0] / 2);
  });
}
// What is folded away is printed too, but for the values of figures.
const folded = document.querySelectorAll("details.print");
addEventListener("beforeprint", () => folded.forEach(one => { one.open = true; }));
