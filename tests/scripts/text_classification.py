"""A script as people have it: `Trainer` on a text classification file, in the style of the official example."""

import sys

from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding
from transformers import TrainingArguments
from transformers import Trainer


model_name, train_file, output_dir = sys.argv[1:]
dataset = load_dataset("csv", data_files={"train": train_file}, cache_dir=f"{output_dir}/cache")["train"]
tokenizer = AutoTokenizer.from_pretrained(model_name)
model = AutoModelForSequenceClassification.from_pretrained(model_name)
dataset = dataset.map(lambda rows: tokenizer(rows["sentence"], truncation=True, max_length=32), batched=True)

trainer = Trainer(
    model=model,
    args=TrainingArguments(output_dir, max_steps=4, logging_steps=1, report_to=[], use_cpu=True, save_strategy="no"),
    train_dataset=dataset,
    processing_class=tokenizer,
    data_collator=DataCollatorWithPadding(tokenizer),
)
trainer.train()
trainer.save_model()
