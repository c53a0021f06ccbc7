"use strict";
// Values under the pointer. The page is complete without this script.
for (const plot of document.querySelectorAll(".plot")) {
  const chart = JSON.parse(plot.dataset.chart);
  const cursor = document.createElement("div");
  const tip = document.createElement("div");
  cursor.className = "cursor";
  tip.className = "tip";
  cursor.hidden = tip.hidden = true;
  plot.append(cursor, tip);

  const fraction = ([low, high, log], value) =>
    log ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low);
  const value = ([low, high, log], at) =>
    log ? low * (high / low) ** at : low + at * (high - low);
  const text = (number) => {
    const size = Math.abs(number);
    if (size !== 0 && size < 1e-3) return number.toExponential(2);
    return Number(number.toPrecision(5)).toLocaleString("en-US", { maximumFractionDigits: 6 });
  };
  const nearest = (points, x) => {
    let low = 0;
    let high = points.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (points[middle][0] < x) low = middle + 1;
      else high = middle;
    }
    return low > 0 && x - points[low - 1][0] < points[low][0] - x ? points[low - 1] : points[low];
  };

  const show = (event) => {
    const box = plot.getBoundingClientRect();
    const at = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    const x = value(chart.x, at);
    const found = chart.series.map((series) => [series, nearest(series.points, x)]);
    // The series with the most points says where the cursor stands.
    const lead = found.reduce((a, b) => (b[0].points.length > a[0].points.length ? b : a));
    const step = lead[1][0];
    const left = Math.max(0, Math.min(1, fraction(chart.x, step)));
    cursor.style.left = `${left * 100}%`;
    const head = document.createElement("div");
    head.textContent = `step ${step.toLocaleString("en-US")}`;
    const rows = found.map(([series, [where, number]]) => {
      const row = document.createElement("div");
      const figure = document.createElement("b");
      row.className = `key c${series.color}`;
      row.textContent = where === step ? series.name : `${series.name}, step ${where}`;
      figure.textContent = text(number);
      row.append(figure);
      return row;
    });
    tip.replaceChildren(head, ...rows);
    cursor.hidden = tip.hidden = false;
    const room = box.width - tip.offsetWidth - 12;
    tip.style.left = `${left * box.width < room ? left * box.width + 12 : left * box.width - tip.offsetWidth - 12}px`;
  };
  const hide = () => {
    cursor.hidden = tip.hidden = true;
  };
  plot.addEventListener("pointermove", show);
  plot.addEventListener("pointerdown", show);
  plot.addEventListener("pointerleave", hide);
}
