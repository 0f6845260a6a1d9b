'use strict';
const settings = JSON.parse(document.getElementById('settings').textContent);

/* Where intervals begin and end cuts an axis into parts; each part with the numbers of the intervals that cover it. */
function parts(intervals) {
  const cuts = [...new Set(intervals.flat())].sort((a, b) => a - b);
  return cuts.slice(1).map((to, i) => ({
    from: cuts[i], to,
    of: intervals.map((_, n) => n).filter(n => intervals[n][0] <= cuts[i] && intervals[n][1] >= to),
  })).filter(part => part.of.length);
}
const rows = parts(settings.rows), columns = parts(settings.columns);

/* One rectangle for each part of the grid, the mean of the patches that lie over it. */
function draw(canvas) {
  const values = Int8Array.from(atob(canvas.dataset.map), c => c.charCodeAt(0)), width = settings.columns.length;
  const context = canvas.getContext('2d');
  const x = v => Math.round(v * canvas.width), y = v => Math.round(v * canvas.height);
  for (const row of rows) for (const column of columns) {
    let sum = 0;
    for (const r of row.of) for (const c of column.of) sum += values[r * width + c];
    context.fillStyle = settings.palette[127 + Math.round(sum / (row.of.length * column.of.length))];
    context.fillRect(x(column.from), y(row.from), x(column.to) - x(column.from), y(row.to) - y(row.from));
  }
}

/* Draw what is near the window. The picture of a card is in the page once; its maps lie over the same. */
const watcher = new IntersectionObserver(entries => {
  for (const entry of entries) if (entry.isIntersecting) {
    watcher.unobserve(entry.target);
    entry.target.querySelectorAll('canvas[data-map]').forEach(draw);
  }
}, { rootMargin: '400px' });
document.querySelectorAll('.card').forEach(card => {
  const source = card.querySelector('img').src;
  card.querySelectorAll('.over img').forEach(image => { image.src = source; });
});
document.querySelectorAll('.flag, .tile, .card').forEach(element => watcher.observe(element));
document.getElementById('scale').style.backgroundImage = `linear-gradient(to right, ${settings.palette.join(',')})`;

const cards = [...document.querySelectorAll('.card')];
const filters = { label: 'filter-label', prediction: 'filter-prediction', wrong: 'filter-wrong' };
const outside = document.getElementById('filter-outside');

function value(key) {
  const element = document.getElementById(filters[key]);
  return element ? element.value : '';
}

function apply() {
  let shown = 0;
  for (const card of cards) {
    const fits = Object.keys(filters).every(key => !value(key) || card.dataset[key] === value(key))
      && !(outside && outside.checked && card.dataset.outside !== '1');
    card.hidden = !fits;
    shown += fits;
  }
  document.getElementById('shown').textContent = `${shown} of ${cards.length}`;
  document.getElementById('none').hidden = shown > 0;
}

/* Set the menus and go to the gallery; a class of which the gallery has no image gets a place in its menu. */
function show(wanted) {
  for (const key of Object.keys(filters)) {
    const element = document.getElementById(filters[key]);
    if (!element) continue;
    const choice = wanted[key] === undefined ? '' : wanted[key];
    if (![...element.options].some(option => option.value === choice)) element.add(new Option(settings.labels[choice], choice));
    element.value = choice;
  }
  if (outside) outside.checked = false;
  apply();
  document.getElementById('gallery').scrollIntoView();
}

Object.values(filters).forEach(id => document.getElementById(id)?.addEventListener('change', apply));
outside?.addEventListener('change', apply);
document.querySelectorAll('[data-show-prediction]').forEach(button =>
  button.addEventListener('click', () => show({ prediction: button.dataset.showPrediction })));
document.querySelectorAll('td[data-label], .pairs button').forEach(element =>
  element.addEventListener('click', () => show({ label: element.dataset.label, prediction: element.dataset.prediction })));
document.getElementById('all-classes')?.addEventListener('click', event => {
  document.querySelectorAll('.tile[hidden]').forEach(tile => { tile.hidden = false; });
  event.target.remove();
});
apply();
